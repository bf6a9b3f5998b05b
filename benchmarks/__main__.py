"""Every benchmark, or those named: ``python -m benchmarks [NAME...]``. Ratios of medians, for machines are noisy."""

from __future__ import annotations

import importlib
import sys

NAMES = ("startup", "export", "training")


def main() -> None:
    for name in sys.argv[1:] or NAMES:
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
