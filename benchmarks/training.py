"""Training: stackctl at depth 0, 1, 2 and 4 beside a plain PEFT loop that pads, on chats of uneven lengths.

Every candidate is a command that trains the same adapter on the same data in float32 and prints its real tokens a
second, by its own loop's time. They run in turn, A B C A B C; what is shown are medians and their ratios.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import run_json

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, RANK = 8, 16
DEPTHS = (0, 1, 2, 4)
PEFT, PEFT_1024 = "PEFT loop, padded to the longest", "PEFT loop, padded to 1,024"


@dataclass(frozen=True)
class Bench:
    """What all candidates share: the data, the base's folder, a registry with frozen adapters, and how long to train.

    ``steps`` is that of most candidates. One that pads to 1,024 takes a single step, for it is that much longer, and
    takes it in parts of two records: eight at once want more than 20 GB.
    """

    folder: Path
    base: Path
    data: Path
    heldout: Path
    steps: int

    @property
    def registry(self) -> Path:
        return self.folder / "registry"


Measured = tuple[dict[str, Any], float]
"""What a candidate printed (``tokens_per_second``, ``eval_loss``), and its peak in megabytes."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", action="append", help="part of a candidate's name; may be repeated")
    asked = parser.parse_args(sys.argv[1:] if __name__ == "__main__" else [])
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(Path(folder), asked.steps)
        found = candidates(bench)
        if asked.only:
            found = {name: run for name, run in found.items() if any(part in name for part in asked.only)}
        show(measure(found, asked.runs))


def candidates(bench: Bench) -> dict[str, Callable[[], Measured]]:
    """Every way to train, by the name that the table shows."""
    found: dict[str, Callable[[], Measured]] = {
        f"stackctl, {depth} frozen adapters": lambda depth=depth: stackctl(bench, depth) for depth in DEPTHS
    }
    found[PEFT] = lambda: peft_loop(bench, "longest", bench.steps, BATCH)
    found[PEFT_1024] = lambda: peft_loop(bench, "1024", 1, 2)
    return found


def stackctl(bench: Bench, depth: int) -> Measured:
    """``stackctl train`` on so many frozen adapters; what it registers is removed again."""
    name = f"new-{depth}"
    on = ["--on", "+".join(f"frozen-{number}" for number in range(depth))] if depth else []
    command = [
        *("train", name, *on, "--base", "smollm2", "--data", str(bench.data), "--eval-data", str(bench.heldout)),
        *("--batch-size", str(BATCH), "--rank", str(RANK), "--max-steps", str(bench.steps), "--dtype", "float32"),
        *("--json", "--registry", str(bench.registry)),
    ]
    measured = run_json([sys.executable, "-m", "stackctl", *command])
    _call(bench.registry, "rm", name)
    return measured


def peft_loop(bench: Bench, pad: str, steps: int, micro_batch: int) -> Measured:
    command = [
        *("-m", "benchmarks.peft_loop", str(bench.base), str(bench.data), str(bench.heldout), "--pad", pad),
        *("--steps", str(steps), "--batch-size", str(BATCH), "--rank", str(RANK)),
        *("--micro-batch-size", str(micro_batch)),
    ]
    return run_json([sys.executable, *command])


def prepare(folder: Path, steps: int) -> Bench:
    """SmolLM2 in a registry, as many random adapters as the deepest stack has, and the data."""
    registry = folder / "registry"
    _call(registry, "init", str(registry))
    base = Path(json.loads(_call(registry, "base", "add", "smollm2", "--json"))["path"])
    _frozen_adapters(base, folder)
    for number in range(max(DEPTHS)):
        _call(registry, "add", f"frozen-{number}", str(folder / f"frozen-{number}"))
    data, heldout = folder / "chats.jsonl", folder / "heldout.jsonl"
    write_chats(data, 256, seed=0)
    write_chats(heldout, 8, seed=1)
    return Bench(folder, base, data, heldout, steps)


def _call(registry: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "stackctl", *arguments, "--registry", str(registry)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _frozen_adapters(base: Path, folder: Path) -> None:
    """Random adapters of the usual size of a trained one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for number in range(max(DEPTHS)):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(folder / f"frozen-{number}")


def write_chats(path: Path, count: int, *, seed: int) -> None:
    """Chats of one question each, whose answers are as uneven in length as those people collect.

    Lengths are log-normal with a median of about 120 tokens; one in twenty has more than 600, the longest under 1,024.
    """
    texts = [json.loads(line)["text"] for line in (EXAMPLES / "style.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in (EXAMPLES / "instruct.jsonl").read_text().splitlines()]
    words = " ".join(texts).split()
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        wanted = min(int(math.exp(generator.gauss(math.log(85), 1.0))), 700)
        start = generator.randrange(len(words) - wanted)
        question = generator.choice(chats)[0]["content"]
        answer = " ".join(words[start : start + max(wanted, 5)])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))


def measure(found: dict[str, Callable[[], Measured]], runs: int) -> dict[str, list[Measured]]:
    """Every candidate ``runs`` times, in turn."""
    results: dict[str, list[Measured]] = {name: [] for name in found}
    for _ in range(runs):
        for name, candidate in found.items():
            results[name].append(candidate())
    return results


def show(results: dict[str, list[Measured]]) -> None:
    """A table of real tokens a second, their ratio to the first row, peaks and held-out loss."""
    speeds = {
        name: statistics.median(said["tokens_per_second"] for said, _ in measured) for name, measured in results.items()
    }
    first = next(iter(speeds.values()))
    print(f"{'':36}{'tokens/s':>10}{'ratio':>8}{'peak MB':>9}{'held-out loss':>15}")
    for name, measured in results.items():
        peak = max(peak for _, peak in measured)
        loss = measured[-1][0]["eval_loss"]
        print(f"{name:36}{speeds[name]:10.0f}{speeds[name] / first:8.3f}{peak:9.0f}{loss:15.3f}")


if __name__ == "__main__":
    main()
