"""How OpenMP's threads wait: tokens a second of typed commands, alone and beside one and two busy processes.

Each row is a way of waiting that is set in the environment, the last one what stackctl does when nothing is set.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import parse_runs, run_json, run_stackctl

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


def main(options: Sequence[str] = ()) -> None:
    runs = parse_runs(options, "threads", 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = folder / "registry"
        run_stackctl(registry, "init")
        run_stackctl(registry, "base", "add", "smollm2")
        texts = [{"text": f"Chapter {number}. " + "The tide came in and went out again. " * 3} for number in range(24)]
        (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
        generate = ["generate", "base", "-p", "Once upon a time", "--raw", "--max-new-tokens", str(_TOKENS)]
        train = ["train", "new", "--base", "smollm2", "--data", str(folder / "texts.jsonl"), "--max-steps", "6"]
        for title, command in (("generate", generate), ("train", train)):
            _table(title, [*command, "--registry", str(registry), "--json"], runs)


def _table(title: str, command: list[str], runs: int) -> None:
    print(f"\n{title}, tokens/s{'':18}{'alone':>12}{'1 busy':>12}{'2 busy':>12}")
    found: dict[str, list[float]] = {name: [] for name in _WAYS}
    for others in (0, 1, 2):
        rates: dict[str, list[float]] = {name: [] for name in _WAYS}
        with busy(others):
            for _ in range(runs):
                for name, environment in _WAYS.items():
                    document, _ = run_json([sys.executable, "-m", "stackctl", *command], environment)
                    rates[name].append(_rate(document))
        for name in _WAYS:
            found[name].append(statistics.median(rates[name]))
    best = [max(rates[place] for rates in found.values()) for place in range(3)]
    for name, medians in found.items():
        print(f"{name:34}" + "".join(f"{m:7.1f} {m / b:4.2f}" for m, b in zip(medians, best, strict=True)), flush=True)


def _rate(document: dict[str, Any]) -> float:
    rate: float = document["tokens_per_second"]
    return rate


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
