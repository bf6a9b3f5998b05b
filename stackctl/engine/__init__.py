"""The tensor work. Imported only inside a command's body: torch and its family take seconds to load.

What answers by llama.cpp does without them, and says so by its imports.
"""

import gc
import logging
import os
import sys

from stackctl.machine import openmp


def _run_in_parallel() -> None:
    import torch

    torch.ones(2**20).add_(1)


# It warns, where nothing is in four bits, of a kernel that it did not find, as soon as PEFT imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Before torch is loaded, which reads it.
if _threads := openmp.set_waiting(os.environ):
    openmp.watch(_threads, _run_in_parallel, lambda: "torch" in sys.modules)

_THRESHOLDS = gc.get_threshold()
# The libraries make a million objects while they are imported, none of them garbage: a fifth of that time is the
# collector's, which walks through them again and again.
gc.set_threshold(1_000_000, *_THRESHOLDS[1:])


def imports_are_done() -> None:
    """Let the garbage collector work as before, on what is made from now on; the first call counts."""
    if gc.get_threshold() != _THRESHOLDS:
        gc.freeze()
        gc.set_threshold(*_THRESHOLDS)
