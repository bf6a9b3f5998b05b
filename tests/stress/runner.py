"""Named jobs that each get a share of the time, and a line each of what they did.

A job is a function that gets a :class:`Budget` and returns an :class:`Outcome`. It stops by itself when the time is
over, keeps its files below the budget's folder, draws all chance from the budget's ``random``, and counts.
"""

from __future__ import annotations

import importlib
import random
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

JOBS = {
    "kills": ("stress.kills:kills", 2.0),
    "killed trainings": ("stress.trainings:trainings", 1.0),
    "writers": ("stress.writers:writers", 1.0),
    "hostile files": ("stress.fuzz:files", 2.0),
    "hostile data": ("stress.fuzz:data", 0.5),
    "hostile repos": ("stress.fuzz_hub:repos", 0.5),
    "refusals": ("stress.refusals:refusals", 0.5),
    "hostile requests": ("stress.serving_attacks:requests", 0.5),
    "architectures": ("stress.architectures:architectures", 3.0),
}
"""Name to the function ("module:function", imported when its turn comes) and its share of the time."""


@dataclass(frozen=True)
class Budget:
    """What a job has: until when, where, and its chance."""

    until: float
    folder: Path
    random: random.Random

    @property
    def is_left(self) -> bool:
        return time.monotonic() < self.until


@dataclass
class Outcome:
    """What a job did: ``line`` with its counts, ``failures`` with all that is needed to do each again."""

    line: str
    failures: list[str] = field(default_factory=list)


def run_jobs(names: list[str], seconds: float, seed: int) -> int:
    """Run jobs one after the other and print a line each; 1 when any of them failed."""
    shares = sum(JOBS[name][1] for name in names)
    failed = 0
    for name in names:
        target, share = JOBS[name]
        outcome = _run(target, seconds * share / shares, f"{seed} {name}")
        print(f"{'FAILED  ' if outcome.failures else ''}{name}: {outcome.line}", flush=True)
        for failure in outcome.failures[:10]:
            print("  " + failure.replace("\n", "\n  "), flush=True)
        failed += bool(outcome.failures)
    return 1 if failed else 0


def _run(target: str, seconds: float, seed: str) -> Outcome:
    module, _, function = target.partition(":")
    in_memory = Path("/dev/shm")  # a kill leaves what was written, flushed or not: only a power cut needs a disk
    place = in_memory if in_memory.is_dir() else None
    with tempfile.TemporaryDirectory(prefix="stackctl-stress-", dir=place) as folder:
        budget = Budget(time.monotonic() + seconds, Path(folder), random.Random(seed))
        try:
            outcome: Outcome = getattr(importlib.import_module(module), function)(budget)
        except Exception:
            outcome = Outcome("broke off", [traceback.format_exc()])
    return outcome
