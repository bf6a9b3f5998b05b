"""TRL's SFTTrainer on the same tokens. Prints what it measured. It runs by another Python, and needs no stackctl.

    TRL_PYTHON trl_loop.py BASE_FOLDER tokens.jsonl heldout.jsonl --layout packing

The data are records tokenised and labelled already (``input_ids``, ``labels``), so that the very same tokens are
supervised as by everyone else: what TRL's ``assistant_only_loss`` would make of the chats, without its change of the
chat template. What TRL offers against padding is asked for by ``--layout``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100
LAYOUTS = ("packing", "padding-free", "padded")


def main(load: Callable[[Path, int], tuple[Any, Any]]) -> None:
    """``load(base, rank)`` gives a model with a new adapter, and the tokenizer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    asked = parser.parse_args()
    records, heldout = read(asked.data), read(asked.heldout)
    model, tokenizer = load(asked.base, asked.rank)
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(model, tokenizer, records, asked, folder)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(json.dumps(clock.said(losses) | {"eval_loss": held_out_loss(model, heldout)}))


def load_with_peft(base: Path, rank: int) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(base)


def read(path: Path) -> list[dict[str, list[int]]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Clock(TrainerCallback):
    """The loop's own seconds, and the tokens that went by."""

    def __init__(self, collate: Any) -> None:
        self._collate = collate
        self._batches: list[tuple[int, int]] = []
        self._steps = 0
        self._started = self._seconds = 0.0

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        labels = [label for example in examples for label in example["labels"]]
        self._batches.append((len(labels), len(labels) - labels.count(IGNORED)))
        return self._collate(examples)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._batches.clear()
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._started
        self._steps = state.global_step

    def said(self, losses: list[float]) -> dict[str, Any]:
        """Batches are collated one ahead, so only those of finished steps are counted."""
        batches = self._batches[: self._steps]
        tokens, supervised = (sum(column) for column in zip(*batches, strict=True))
        return {
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_second": tokens / self._seconds,
            "loss": sum(loss * count for loss, (_, count) in zip(losses, batches, strict=True)) / supervised,
        }


def make_trainer(
    model: Any, tokenizer: Any, records: list[dict[str, list[int]]], asked: argparse.Namespace, folder: str
) -> tuple[SFTTrainer, Clock]:
    """TRL at its best: no checkpointing of activations, no casts, as little padding as the layout allows.

    Packed rows hold about as many tokens as a batch of records, so that a step is as large as everyone else's.
    """
    mean = sum(len(record["input_ids"]) for record in records) / len(records)
    rows = max(1, round(asked.batch_size * mean / 1024)) if asked.layout == "packing" else asked.batch_size
    arguments = SFTConfig(
        output_dir=folder,
        max_length=1024 if asked.layout == "packing" else None,  # the records are cut already
        packing=asked.layout == "packing",
        padding_free=asked.layout == "padding-free",
        per_device_train_batch_size=rows,
        num_train_epochs=1,
        learning_rate=asked.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(model, args=arguments, train_dataset=Dataset.from_list(records), processing_class=tokenizer)
    clock = Clock(trainer.data_collator)
    trainer.data_collator = clock
    trainer.add_callback(clock)
    return trainer, clock


def held_out_loss(model: Any, examples: list[dict[str, list[int]]]) -> float:
    """Mean cross-entropy over the supervised tokens, each example alone."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])[1:]
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
            count += int((labels != IGNORED).sum())
    return total / max(count, 1)


if __name__ == "__main__":
    main(load_with_peft)
