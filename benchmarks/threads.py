"""How OpenMP's threads wait: tokens a second of typed commands, alone and beside one and two busy processes.

Each row is a way of waiting that is set in the environment, the last one what stackctl does when nothing is set. Of
``eval`` the tokens of its records are counted, over the whole command; of ``serve`` those of an answer, once the stack
is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.serving import burst, running_server
from benchmarks.timing import Whole, run_stackctl, run_whole

_WAYS: dict[str, dict[str, str]] = {
    "asleep (OMP_WAIT_POLICY=PASSIVE)": {"OMP_WAIT_POLICY": "PASSIVE"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "libgomp's default, 300000": {"GOMP_SPINCOUNT": "300000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "stackctl": {},
}
_BUSY = "while True: pass"
_TOKENS = 64
Rate = Callable[[Mapping[str, str]], float]
"""Tokens a second of a command under some variables of the environment."""


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks threads")
    parser.add_argument("--runs", type=int, default=3, help="runs of each, in turn (3)")
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1, 2], help="processes beside (0 1 2)")
    parser.add_argument("--commands", nargs="+", default=["generate", "train", "eval", "serve"])
    given = parser.parse_args(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_stackctl(folder, "init")
        run_stackctl(folder, "base", "add", "smollm2")
        rates = _rates(folder)
        for command in given.commands:
            _table(command, rates[command], given.runs, given.busy)


def _rates(folder: Path) -> dict[str, Rate]:
    texts = [{"text": f"Chapter {number}. " + "The tide came in and went out again. " * 3} for number in range(24)]
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps(text) + "\n" for text in texts))
    few = ["--max-new-tokens", str(_TOKENS)]

    def run(environment: Mapping[str, str], *words: object) -> Whole:
        command = [sys.executable, "-m", "stackctl", *map(str, words), "--registry", str(folder), "--json"]
        return run_whole(command, environment)

    def typed(*words: object) -> Rate:
        return lambda environment: float(run(environment, *words).said["tokens_per_second"])

    def evaluated(environment: Mapping[str, str]) -> float:
        whole = run(environment, "eval", "base", "--data", data)
        return float(whole.said["results"][0]["tokens"]) / whole.seconds

    def served(environment: Mapping[str, str]) -> float:
        with running_server([sys.executable, "-m", "stackctl", "serve", "-q"], folder, environment) as url:
            burst(url, ["base"], 1, 2)  # which loads it
            return burst(url, ["base"], 1, _TOKENS).tokens

    return {
        "generate": typed("generate", "base", "-p", "Once upon a time", "--raw", *few),
        "train": typed("train", "new", "--base", "smollm2", "--data", data, "--max-steps", 6),
        "eval": evaluated,
        "serve": served,
    }


def _table(title: str, rate: Rate, runs: int, beside: Sequence[int]) -> None:
    print(
        f"\n{title + ', tokens/s':34}" + "".join(f"{f'{number} busy' if number else 'alone':>12}" for number in beside)
    )
    found: dict[str, list[float]] = {name: [] for name in _WAYS}
    for others in beside:
        rates: dict[str, list[float]] = {name: [] for name in _WAYS}
        with busy(others):
            for _ in range(runs):
                for name, environment in _WAYS.items():
                    rates[name].append(rate(environment))
        for name in _WAYS:
            found[name].append(statistics.median(rates[name]))
    best = [max(rates[place] for rates in found.values()) for place in range(len(beside))]
    for name, medians in found.items():
        print(f"{name:34}" + "".join(f"{m:7.1f} {m / b:4.2f}" for m, b in zip(medians, best, strict=True)), flush=True)


@contextlib.contextmanager
def busy(number: int) -> Iterator[None]:
    """So many processes beside, each of which uses a core whole."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main(sys.argv[1:])
