"""LLaMA-Factory's ``create_new_adapter`` on the same tokens: the frozen adapter is merged, a new one trained on it.

    LLAMA_FACTORY_PYTHON llama_factory_loop.py BASE_FOLDER FROZEN_ADAPTER tokens.jsonl heldout.jsonl

It runs by another Python, and needs no stackctl. The records come as a data set that is tokenised already, which
LLaMA-Factory pads to the longest of a batch.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import json
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

audio = types.ModuleType("torchaudio")
audio.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
sys.modules.setdefault("torchaudio", audio)  # imported for sound, which no text has; its builds lag behind torch's

from datasets import Dataset, DatasetDict  # noqa: E402
from llamafactory.train.tuner import run_exp  # noqa: E402

IGNORED = -100


class Clock(TrainerCallback):
    """The loop's own seconds, and its losses."""

    def __init__(self) -> None:
        self.seconds = self._started = 0.0
        self.losses: list[float] = []
        self.eval_loss = float("nan")

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self._started

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])
        self.eval_loss = logs.get("eval_loss", self.eval_loss)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("frozen")
    parser.add_argument("data", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    asked = parser.parse_args()
    records, heldout = read(asked.data), read(asked.heldout)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens"
        DatasetDict(train=Dataset.from_list(records), validation=Dataset.from_list(heldout)).save_to_disk(str(tokens))
        arguments = {
            "stage": "sft",
            "do_train": True,
            "do_eval": True,
            "model_name_or_path": asked.base,
            "adapter_name_or_path": asked.frozen,
            "create_new_adapter": True,
            "finetuning_type": "lora",
            "lora_rank": asked.rank,
            "lora_alpha": 2 * asked.rank,
            "lora_target": "all",
            "dataset": "named because it must be; the tokens below are taken",
            "eval_dataset": "likewise",
            "tokenized_path": str(tokens),
            "template": "chatml",
            "cutoff_len": 1024,
            "output_dir": f"{folder}/out",
            "per_device_train_batch_size": asked.batch_size,
            "per_device_eval_batch_size": len(heldout),  # its mean over tokens is a batch's, not the data set's
            "num_train_epochs": 1,
            "learning_rate": asked.learning_rate,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_gradient_checkpointing": True,
            "disable_tqdm": True,
            "seed": 0,
        }
        run_exp(arguments, callbacks=[clock])
    tokens_seen = sum(len(record["input_ids"]) for record in records)
    said = {
        "tokens": tokens_seen,
        "supervised_tokens": sum(label != IGNORED for record in records for label in record["labels"][1:]),
        "tokens_per_second": tokens_seen / clock.seconds,
        "loss": sum(clock.losses) / len(clock.losses),
        "eval_loss": clock.eval_loss,
    }
    print(json.dumps(said))


def read(path: Path) -> list[dict[str, list[int]]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [record | {"attention_mask": [1] * len(record["input_ids"])} for record in records]


if __name__ == "__main__":
    main()
