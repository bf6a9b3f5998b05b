"""Pairs of answers of uneven lengths: ``train --objective dpo`` on a frozen stack beside TRL's DPOTrainer.

Whole processes, in turn, in float32, on the same pairs. TRL gets the stack merged into a model beforehand.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peer_environments import TRL, peer_python, versions
from benchmarks.timing import Whole, run_stackctl, run_whole
from benchmarks.training import _frozen_adapters

BATCH, RANK, RATE = 4, 16, 2e-4
WORDS = ("the", "sea", "is", "grey", "old", "men", "sit", "on", "quay", "with", "nets", "red", "rope", "rain", "falls")


def main(options: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks preferences")
    parser.add_argument("--pairs", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--trl", help="a Python that has TRL; else an environment is made in the user's cache")
    asked = parser.parse_args(options)
    python = Path(asked.trl) if asked.trl else peer_python(TRL)
    print(f"beside {versions(python, 'trl')}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry, data, merged = folder / "registry", folder / "pairs.jsonl", folder / "merged"
        run_stackctl(registry, "init", str(registry))
        base = Path(run_stackctl(registry, "base", "add", "smollm2")["path"])
        _frozen_adapters(base, folder)
        run_stackctl(registry, "add", "frozen", str(folder / "frozen-0"))
        run_stackctl(registry, "export", "frozen", "--format", "model", "--dtype", "float32", "--out", str(merged))
        write_pairs(data, asked.pairs)
        ours = [
            *(sys.executable, "-m", "stackctl", "train", "new", "--on", "frozen", "--data", str(data)),
            *("--objective", "dpo", "--batch-size", str(BATCH), "--rank", str(RANK), "--epochs", str(asked.epochs)),
            *("--dtype", "float32", "--scheduler", "constant", "--warmup", "0", "--learning-rate", str(RATE)),
            *("--no-cache", "--json", "--registry", str(registry)),
        ]
        theirs = [
            *(str(python), str(Path(__file__).with_name("trl_dpo_loop.py")), str(merged), str(data)),
            *("--batch-size", str(BATCH), "--rank", str(RANK), "--epochs", str(asked.epochs)),
            *("--learning-rate", str(RATE)),
        ]
        found: dict[str, list[Whole]] = {"stackctl": [], "TRL DPOTrainer": []}
        for _ in range(asked.runs):
            for who, command in zip(found, (ours, theirs), strict=True):
                found[who].append(run_whole(command))
    show(found, asked.pairs * asked.epochs)


def write_pairs(path: Path, count: int) -> None:
    """Prompts of 10 to 120 words, answers of 5 to 160."""
    draw = random.Random(0)

    def turn(role: str, least: int, most: int) -> list[dict[str, str]]:
        return [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(least, most)))}]

    records = [
        {"prompt": turn("user", 10, 120), "chosen": turn("assistant", 5, 160), "rejected": turn("assistant", 5, 160)}
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def show(found: dict[str, list[Whole]], pairs: int) -> None:
    print(f"{'':20}{'pairs/s':>9}{'processor s':>13}{'peak MB':>9}{'tokens':>9}{'mean loss':>11}")
    for who, runs in found.items():
        seconds = statistics.median(run.seconds for run in runs)
        processor = statistics.median(run.processor for run in runs)
        peak, said = max(run.peak_mb for run in runs), runs[-1].said
        print(f"{who:20}{pairs / seconds:9.3f}{processor:13.1f}{peak:9.0f}{said['tokens']:9.0f}{said['loss']:11.4f}")
    for what in ("seconds", "processor"):
        ours, theirs = (statistics.median(getattr(run, what) for run in runs) for runs in found.values())
        print(f"{what}: TRL's are {theirs / ours:.2f} times ours")
