"""A thread that leaves the computing to another has no pool of threads, or neither would spin."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import os, threading, torch
from stackctl.machine.openmp import give_up_pool
def threads():
    return len(os.listdir("/proc/self/task"))
def compute():
    return torch.randn(4_000_000).exp().sum()
torch.set_num_threads(3)
compute()
before = threads()
give_up_pool()
given_up = threads()
compute()
print(before - given_up, threads() - given_up)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp")
def test_a_pool_ends_and_is_made_again() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "3"}
    found = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.split() == ["2", "2"]
