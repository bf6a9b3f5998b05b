"""Run commands in turn and compare their medians: A B C A B C …, so that a machine's drift hits all alike."""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of every run, and the largest resident memory of the command in megabytes."""

    seconds: tuple[float, ...]
    peak_mb: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Whole:
    """A process from its start to its end: seconds, seconds of processors, peak megabytes, and what it printed."""

    seconds: float
    processor: float
    peak_mb: float
    out: str

    @property
    def said(self) -> dict[str, Any]:
        """The JSON document in its last line."""
        document: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return document


_LAUNCHER = """
import os, sys, time
start = time.perf_counter()
_, status, used = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
with open(sys.argv[1], "w") as told:
    print(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024, file=told)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"""
"""Linux counts what a process held before it became the command, which is what its parent held: so that is small."""


def run_whole(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Whole:
    """One command, run to its end. One that fails ends the benchmark with what it said."""
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        tempfile.NamedTemporaryFile("r") as told,
    ):
        launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, told.name, *command]
        code = subprocess.call(launched, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        out.seek(0), err.seek(0)
        if code:
            sys.exit(err.read()[-4000:] or f"exit {code}: {' '.join(command)}")
        seconds, processor, peak = map(float, told.read().split())
        return Whole(seconds, processor, peak, out.read())


def run_command(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[float, float]:
    """Seconds and peak megabytes of one command, run to its end."""
    whole = run_whole(command, environment)
    return whole.seconds, whole.peak_mb


def run_json(command: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[dict[str, Any], float]:
    """The JSON document that a command prints as its last line, and its peak megabytes."""
    whole = run_whole(command, environment)
    return whole.said, whole.peak_mb


def run_stackctl(registry: Path, *arguments: object) -> dict[str, Any]:
    """The JSON document of one stackctl command in that registry. What it says as it goes is left out."""
    words = [str(argument) for argument in arguments]
    return run_whole([sys.executable, "-m", "stackctl", *words, "--json", "--registry", str(registry)]).said


def compare(candidates: Mapping[str, Callable[[], tuple[float, float]]], runs: int) -> dict[str, Timing]:
    """Run every candidate ``runs`` times in turn, after one run of each that does not count."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for number in range(runs + 1):
        for name, candidate in candidates.items():
            result = candidate()
            if number:
                found[name].append(result)
    return {name: Timing(tuple(s for s, _ in rs), max(m for _, m in rs)) for name, rs in found.items()}


def timed(action: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """A candidate out of a function of this process."""

    def run() -> tuple[float, float]:
        start = time.perf_counter()
        action()
        seconds = time.perf_counter() - start
        return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    return run


def show(timings: Mapping[str, Timing], reference: str) -> None:
    """A table of medians, ratios to ``reference`` and peaks."""
    base = timings[reference].median
    print(f"{'':44}{'median s':>10}{'ratio':>8}{'peak MB':>9}")
    for name, timing in timings.items():
        print(f"{name:44}{timing.median:10.3f}{timing.median / base:8.2f}{timing.peak_mb:9.0f}")


def parse_runs(options: Sequence[str], name: str, default: int) -> int:
    """``--runs N`` of a benchmark that takes nothing else."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks {name}")
    parser.add_argument("--runs", type=int, default=default, help=f"how often each candidate runs ({default})")
    runs: int = parser.parse_args(options).runs
    return runs
