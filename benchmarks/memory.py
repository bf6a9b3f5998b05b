"""Memory: what ``train --dry-run`` says beside the peak of the whole process, with activations kept and computed again.

SmolLM2 on one long record, on eight short ones and on four of 1,024 tokens, and a small deep Llama of 200,000 words.
Every row is two commands, each a process of its own: the dry run's ``memory.total`` and a training's largest resident
memory. It fails where one is more than 20 % from the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.timing import run_json, run_stackctl

TOLERANCE = 0.2
EXAMPLES = Path(__file__).parents[1] / "examples"
LONG = 4096


@dataclass(frozen=True)
class Shape:
    """So many records of so many tokens in a micro-batch, on a base."""

    base: str
    records: int
    tokens: int


SHAPES = (
    Shape("smollm2", 1, LONG),
    Shape("smollm2", 8, 64),
    Shape("smollm2", 4, 1024),
    Shape("words", 4, 1023),
)


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks memory")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each training")
    parser.add_argument("--only", help="part of a row's name")
    parser.add_argument(
        "--option", action="append", default=[], help="an option of both commands, as --option=--dtype=float32"
    )
    asked = parser.parse_args(list(options))
    wrong = []
    print(f"{'':44}{'estimate MB':>12}{'measured MB':>12}{'ratio':>7}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        for shape in SHAPES:
            for kept in (True, False):
                label = f"{shape.base}, {shape.records} x {shape.tokens}{'' if kept else ', checkpointed'}"
                if asked.only and asked.only not in label:
                    continue
                estimate, measured, parts = compare(folder, shape, asked.steps, kept=kept, more=asked.option)
                print(f"{label:44}{estimate / 1e6:12.0f}{measured / 1e6:12.0f}{estimate / measured:7.2f}", flush=True)
                print(f"    {parts}", file=sys.stderr, flush=True)
                if abs(estimate - measured) > TOLERANCE * measured:
                    wrong.append(label)
    if wrong:
        sys.exit(f"more than {TOLERANCE:.0%} from what was measured: {'; '.join(wrong)}")


def compare(
    folder: Path, shape: Shape, steps: int, *, kept: bool, more: Sequence[str]
) -> tuple[float, float, dict[str, int]]:
    """Bytes: estimated, measured, and what the estimate consists of."""
    command = [
        *(sys.executable, "-m", "stackctl", "train", "new", "--registry", str(folder / "registry")),
        *("--base", shape.base, "--data", str(folder / "texts.jsonl"), "--max-length", str(shape.tokens)),
        *("--batch-size", str(shape.records), "--max-steps", str(steps), "--json", *more),
        "--no-gradient-checkpointing" if kept else "--gradient-checkpointing",
    ]
    dry, _ = run_json([*command, "--dry-run"])
    _, peak = run_json(command)
    return dry["memory"]["total"], peak * 1024**2, dry["memory"]


def prepare(folder: Path) -> None:
    """A registry with both bases, and texts that are longer than any shape."""
    registry = folder / "registry"
    run_stackctl(registry, "init", str(registry))
    smollm2 = Path(run_stackctl(registry, "base", "add", "smollm2")["path"])
    _many_words(folder / "words", smollm2)
    run_stackctl(registry, "base", "add", "words", str(folder / "words"))
    text = " ".join(json.loads(line)["text"] for line in (EXAMPLES / "style.jsonl").read_text().splitlines())
    long = (text + " ") * (1 + 8 * LONG // len(text))
    lines = [json.dumps({"text": f"{number} {long}"}) + "\n" for number in range(8)]
    (folder / "texts.jsonl").write_text("".join(lines))


def _many_words(out: Path, tokenizer: Path) -> None:
    """A Llama of 24 narrow layers with 200,000 words, random, behind another model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200_000, hidden_size=256, intermediate_size=704, num_hidden_layers=24, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1:])
