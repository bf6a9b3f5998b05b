"""An adapter moved onto another stack or base, beside one that is trained afresh there: steps to the same loss.

``style`` is trained on half of its texts and ``instruct`` on that; then style goes on with the other half, and instruct
is wanted on the new one: begun at the old instruct in a quarter of the steps, and afresh in all of them, on the same
conversations and with the same held-out ones. With ``--revision`` the new style is exported as a model instead, which
is a base that grew out of the old one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import run_stackctl

EXAMPLES = Path(__file__).parents[1] / "examples"
CHAT, HELD_OUT = EXAMPLES / "instruct.jsonl", EXAMPLES / "instruct-heldout.jsonl"


@dataclass(frozen=True)
class Bench:
    """A registry, its base's name, and how the trainings go."""

    registry: Path
    base: str
    rate: str
    rank: str

    def call(self, *arguments: str) -> dict[str, Any]:
        return run_stackctl(self.registry, *arguments)

    def train(self, name: str, data: Path, steps: int, *more: str) -> dict[str, Any]:
        given = ["--data", str(data), "--max-steps", str(steps), "--learning-rate", self.rate, *more]
        rank = [] if "--from" in more else ["--rank", self.rank]
        return self.call("train", name, *given, *rank)

    def instruct(self, name: str, steps: int, every: int, *more: str) -> dict[str, Any]:
        return self.train(name, CHAT, steps, "--eval-data", str(HELD_OUT), "--eval-steps", str(every), *more)


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks rebase")
    parser.add_argument("--steps", type=int, default=28, help="steps of the training afresh")
    parser.add_argument("--style-steps", type=int, default=16, help="steps of each style")
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--rank", default="16")
    parser.add_argument("--base", default="smollm2", help="what base add takes: smollm2, a folder, a Hub id")
    parser.add_argument("--revision", action="store_true", help="move onto a base that grew out of the old one")
    asked = parser.parse_args(list(options))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bench = prepare(folder, asked)
        halves = texts(folder)
        bench.train("style", halves[0], asked.style_steps, "--base", bench.base)
        below = ["--base", bench.base] if asked.revision else ["--on", "style@1"]
        every = max(1, asked.steps // 14)
        bench.instruct("instruct", asked.steps, every, *below)
        bench.train("style", halves[1], asked.style_steps, "--from", "style@1")
        onto = revised(bench, folder) if asked.revision else ["--on", "style@2"]
        quarter = max(1, asked.steps // 4)
        moved = bench.instruct("instruct", quarter, max(1, every // 2), *onto, "--from", "instruct@1")
        afresh = bench.instruct("afresh", asked.steps, every, *onto)
        show(moved, afresh)


def prepare(folder: Path, asked: argparse.Namespace) -> Bench:
    name = "smollm2" if asked.base == "smollm2" else "old"
    bench = Bench(folder / "registry", name, asked.learning_rate, asked.rank)
    bench.call("init")
    bench.call("base", "add", *dict.fromkeys((name, asked.base)))
    return bench


def texts(folder: Path) -> tuple[Path, Path]:
    """The texts of style in two halves."""
    lines = (EXAMPLES / "style.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = folder / "first.jsonl", folder / "second.jsonl"
    for file, part in zip(files, (lines[: len(lines) // 2], lines[len(lines) // 2 :]), strict=True):
        file.write_text("".join(part), encoding="utf-8")
    return files


def revised(bench: Bench, folder: Path) -> list[str]:
    """A base with the new style in its weights."""
    bench.call("export", "style@2", "--format", "model", "--dtype", "float32", "--out", str(folder / "revised"))
    bench.call("base", "add", "revised", str(folder / "revised"))
    return ["--base", "revised"]


def curve(registered: dict[str, Any]) -> dict[int, float]:
    """Held-out losses of a run by its steps."""
    log = Path(registered["path"]) / "training_log.jsonl"
    points = [json.loads(line) for line in log.read_text().splitlines()]
    return {point["step"]: point["eval_loss"] for point in points if "eval_loss" in point}


def show(moved: dict[str, Any], afresh: dict[str, Any]) -> None:
    """Losses by step, what was found before the first, and the steps to what the training afresh ends at."""
    curves = {"moved": curve(moved), "afresh": curve(afresh)}
    print(f"{'step':>6}" + "".join(f"{name:>10}" for name in curves))
    for step in sorted({step for found in curves.values() for step in found}):
        print(
            f"{step:6}" + "".join(f"{found[step]:10.3f}" if step in found else f"{'':10}" for found in curves.values())
        )
    said, wanted = moved["moved"], min(curves["afresh"].values())
    correction = "not tried" if said["loss_corrected"] is None else f"{said['loss_corrected']:.3f}"
    print(f"on {said['records']} records: before {said['loss_before']:.3f}, copy {said['loss_copy']:.3f}, ", end="")
    print(f"corrected {correction}, divergence {said['divergence']:.3f} nats a token, {said['seconds']:.1f} s")
    print(f"the mark {said['mark']:.3f}: reached at step {said['reached_step']}")
    for name, found in curves.items():
        reached = next((step for step, loss in sorted(found.items()) if loss <= wanted), None)
        print(f"{name}: {wanted:.3f}, what a training afresh ends at, at step {reached}")


if __name__ == "__main__":
    main(sys.argv[1:])
