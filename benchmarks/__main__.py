"""Every benchmark, or those named: ``python -m benchmarks [NAME...]``. Ratios of medians, for machines are noisy.

One that is named alone takes options of its own: ``python -m benchmarks training --help``.
"""

from __future__ import annotations

import importlib
import itertools
import sys

NAMES = (
    "startup",
    "scale",
    "export",
    "training",
    "beginnings",
    "preferences",
    "rebase",
    "generation",
    "evaluation",
    "serving",
    "threads",
    "limits",
)


def main() -> None:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), sys.argv[1:]))
    options = sys.argv[1 + len(names) :]
    if options and len(names) != 1:
        sys.exit("options belong to one benchmark: python -m benchmarks NAME --help")
    for name in names or NAMES:
        print(f"\n== {name}", flush=True)
        module = importlib.import_module(f"benchmarks.{name}")
        module.main(options)


if __name__ == "__main__":
    main()
