"""What a crowd costs: the same things done in a registry of 10,000 adapters with 10 versions each, and in one of 10."""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.many_adapters import adapter_name, registry_of_many, write_checkpoint
from benchmarks.timing import Timing, compare, run_command, timed
from stackctl.core.provenance import HubSource
from stackctl.registry.adapters import find_digest
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry
from stackctl.registry.versions import record_push

_FEW = 10
_DEEP = 2_000
_COMMAND = [sys.executable, "-m", "stackctl"]
Candidate = Callable[[], tuple[float, float]]


def main(arguments: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--versions", type=int, default=10)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        crowds = {}
        for count in (_FEW, options.adapters):
            place = Path(folder) / str(count)
            registry = registry_of_many(place, count, options.versions)
            for seed, name in enumerate(("style", "instruct"), 1):
                run_command(_add(registry, name, write_checkpoint(place / name, seed)))
            crowds[count] = registry
        _show_deep(registry_of_many(Path(folder) / "deep", 1, _DEEP))
        candidates = {
            f"{count}": _candidates(registry, place=Path(folder) / str(count), count=count)
            for count, registry in crowds.items()
        }
        few, many = candidates.values()
        pairs = {f"{what} {size}": c for what in few for size, c in (("few", few[what]), ("many", many[what]))}
        _show(compare(pairs, options.runs), list(few), options.adapters)


def _add(registry: Registry, name: str, checkpoint: Path) -> list[str]:
    return [*_COMMAND, "add", name, str(checkpoint), "--base", "small", "--registry", str(registry.root)]


def _candidates(registry: Registry, place: Path, count: int) -> dict[str, Candidate]:
    """What is done in a registry of so many adapters, by what the table calls it."""
    middle, last = adapter_name(count // 2), adapter_name(count - 1)
    digest = next(row for row in registry.adapters() if row.name == middle).versions[-1].digest
    seeds = itertools.count(100)
    where = ["--registry", str(registry.root)]
    completing = {"_STACKCTL_COMPLETE": "complete_bash", "COMP_CWORD": "2", "STACKCTL_REGISTRY": str(registry.root)}

    def command(*words: str) -> Candidate:
        return lambda: run_command([*_COMMAND, *words, *where])

    def add() -> tuple[float, float]:
        seed = next(seeds)
        return run_command(_add(registry, "new", write_checkpoint(place / f"new-{seed}", seed)))

    return {
        "resolve a name, in the process": timed(lambda: resolve_expression(registry, middle)),
        "find a digest, in the process": timed(lambda: find_digest(registry, digest)),
        "inspect NAME --json": command("inspect", middle, "--json"),
        "complete a name": lambda: run_command(
            _COMMAND, {**completing, "COMP_WORDS": f"stackctl inspect {middle[:-1]}"}
        ),
        "ls": command("ls"),
        "ls --json": command("ls", "--json"),
        "ls -q": command("ls", "-q"),
        "rm NAME --dry-run": command("rm", last, "--dry-run"),
        "compose style+instruct": command("compose", "style+instruct"),
        "add": add,
    }


def _show_deep(registry: Registry) -> None:
    """One adapter with a great many versions, which are all in one file."""
    name, commits = adapter_name(0), map(str, itertools.count())

    def record() -> None:
        record_push(
            registry, resolve_expression(registry, name).members[0], HubSource(repo="me/one", commit=next(commits))
        )

    timings = compare({"resolved": timed(lambda: resolve_expression(registry, name)), "changed": timed(record)}, 3)
    said = ", ".join(f"{what} in {timing.median:.2f} s" for what, timing in timings.items())
    print(f"an adapter with {_DEEP:,} versions: {said}")


def _show(timings: dict[str, Timing], rows: list[str], adapters: int) -> None:
    print(f"{'':34}{f'among {_FEW}, s':>14}{f'among {adapters:,}, s':>18}{'ratio':>8}{'peak MB':>9}")
    for what in rows:
        few, many = timings[f"{what} few"], timings[f"{what} many"]
        print(
            f"{what:34}{few.median:14.4f}{many.median:18.4f}{many.median / few.median:8.2f}"
            + ("" if "process" in what else f"{many.peak_mb:9.0f}")
        )
