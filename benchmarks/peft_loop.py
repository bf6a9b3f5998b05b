"""The training loop that many scripts have: PEFT, a padded batch, the model's own loss. Prints what it measured.

    python -m benchmarks.peft_loop BASE_FOLDER data.jsonl heldout.jsonl --pad longest --steps 4

Tokens and labels are those that stackctl makes, so that only the loop is compared: the same tokens are supervised.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import IGNORED, EncodeOptions, Example
from stackctl.engine.records.read import read_records


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("base", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("heldout", type=Path)
    parser.add_argument("--pad", default="longest", help="longest, or a number of tokens")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, help="records at once, where a batch does not fit into memory")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    asked = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(asked.base)
    examples = encode(read_records(asked.data), tokenizer, EncodeOptions(1024)).examples
    heldout = encode(read_records(asked.heldout), tokenizer, EncodeOptions(1024)).examples
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(asked.base, dtype=torch.float32)
    model = get_peft_model(
        model, LoraConfig(r=asked.rank, lora_alpha=2 * asked.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    length = None if asked.pad == "longest" else int(asked.pad)
    batches = shuffled(examples, asked.batch_size, asked.steps)
    size = asked.micro_batch_size or asked.batch_size
    start = time.perf_counter()
    losses = train(
        model,
        [
            [padded(batch[at : at + size], tokenizer.pad_token_id, length) for at in range(0, len(batch), size)]
            for batch in batches
        ],
        asked.learning_rate,
    )
    seconds = time.perf_counter() - start
    tokens = sum(len(example.input_ids) for batch in batches for example in batch)
    supervised = sum(supervised_count(batch) for batch in batches)
    said = {
        "tokens": tokens,
        "supervised_tokens": supervised,
        "tokens_per_second": tokens / seconds,
        "loss": sum(losses) / supervised,
        "eval_loss": held_out_loss(model, heldout),
    }
    print(json.dumps(said))


def shuffled(examples: Sequence[Example], size: int, steps: int) -> list[list[Example]]:
    """As many batches as there are steps, over as many shuffled epochs as that takes."""
    order: list[int] = []
    generator = random.Random(0)
    while len(order) < size * steps:
        order += generator.sample(range(len(examples)), len(examples))
    return [[examples[index] for index in order[step * size : (step + 1) * size]] for step in range(steps)]


def padded(batch: Sequence[Example], pad: int, length: int | None) -> dict[str, torch.Tensor]:
    """A batch padded on the right, to its longest example or to ``length``."""
    length = length or max(len(example.input_ids) for example in batch)

    def column(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([value + [fill] * (length - len(value)) for value in values])

    return {
        "input_ids": column([example.input_ids for example in batch], pad),
        "attention_mask": column([[1] * len(example.input_ids) for example in batch], 0),
        "labels": column([example.labels for example in batch], IGNORED),
    }


def supervised_count(batch: Sequence[Example]) -> int:
    return sum(label != IGNORED for example in batch for label in example.labels[1:])


def train(model: Any, batches: Sequence[Sequence[dict[str, torch.Tensor]]], learning_rate: float) -> list[float]:
    """A step for each batch of micro-batches. Returns the summed loss of each micro-batch."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=0.0)
    model.train()
    losses = []
    for batch in batches:
        for part in batch:
            loss = model(**part).loss
            losses.append(float(loss.detach()) * int((part["labels"][:, 1:] != IGNORED).sum()))
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return losses


def held_out_loss(model: Any, examples: Sequence[Example]) -> float:
    """Mean over the supervised tokens, example by example."""
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for example in examples:
            batch = padded([example], 0, None)
            tokens = supervised_count([example])
            total += float(model(**batch).loss) * tokens
            count += tokens
    return total / max(count, 1)


if __name__ == "__main__":
    main()
