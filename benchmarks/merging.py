"""Methods of composing at an 8B model's shapes: the small cores beside TIES on the full matrices, time and peak.

A layer has every shape there is, and the others are like it, so that one or a few stand for the whole model. Reading
the factors and measuring the distance from the exact sum are in the time, starting Python and torch is not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.large_registry import LAYERS, large_registry
from benchmarks.timing import compare, run_json, show

_METHODS = {
    "ties": 'MethodOptions(density=0.5)', "dare_ties": 'MethodOptions(density=0.5, seed=0)',
    "knots_ties": 'MethodOptions(density=0.5)', "tsv": 'MethodOptions()', "iso_c": 'MethodOptions()',
    "core_ties": 'MethodOptions(density=0.5)',
}  # fmt: skip
_MERGE = """
import json, sys, time
from dataclasses import replace
from pathlib import Path
from stackctl.core.schema import MethodOptions
from stackctl.engine.merging import measure
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry
registry = Registry(Path(sys.argv[1]))
stack = replace(resolve_expression(registry, "style+instruct"), method=sys.argv[2], options={options})
plan = read_plan(registry, stack).check()
start = time.perf_counter()
found = measure(plan)
print(json.dumps({{"seconds": time.perf_counter() - start, "rank": found.rank}}))
"""


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks merging")
    parser.add_argument("--layers", type=int, default=1, help=f"layers of 7 modules, of {LAYERS} (1)")
    parser.add_argument("--rank", type=int, default=16, help="of both adapters (16)")
    parser.add_argument("--runs", type=int, default=3, help="how often each method runs (3)")
    asked = parser.parse_args(options)
    with tempfile.TemporaryDirectory() as folder:
        registry = large_registry(Path(folder), rank=asked.rank, layers=asked.layers)
        timings = compare({name: _merged(registry, name) for name in _METHODS}, asked.runs)
    print(f"two adapters of rank {asked.rank}, {7 * asked.layers} modules with the shapes of Llama-3-8B")
    show(timings, "ties")
    print(f"for all {7 * LAYERS} modules:", end=" ")
    print(", ".join(f"{name} {timing.median * LAYERS / asked.layers:,.1f} s" for name, timing in timings.items()))


def _merged(registry: Path, method: str) -> Callable[[], tuple[float, float]]:
    code = _MERGE.format(options=_METHODS[method])

    def run() -> tuple[float, float]:
        found, peak = run_json([sys.executable, "-c", code, str(registry), method])
        return found["seconds"], peak

    return run
