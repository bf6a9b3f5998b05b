"""The long versions of the tests that try to break a registry: ``python -m tests.stress [--minutes M] [JOB...]``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # tests/checkpoints.py and its neighbours, as conftest.py has it
os.environ.setdefault("OMP_NUM_THREADS", "1")

from .runner import JOBS, run_jobs


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help=f"some of: {', '.join(JOBS)}; all when left out")
    parser.add_argument("--minutes", type=float, default=30, help="for all jobs together")
    parser.add_argument("--seed", type=int, default=0, help="the same seed does the same things")
    options = parser.parse_args()
    if unknown := set(options.jobs) - set(JOBS):
        parser.error(f"there is no job {', '.join(sorted(unknown))}")
    return run_jobs(options.jobs or list(JOBS), options.minutes * 60, options.seed)


if __name__ == "__main__":
    sys.exit(main())
