"""The tensor work. Imported only inside a command's body: torch and its family take seconds to load."""

import logging
import os

from stackctl.machine import openmp


def _run_in_parallel() -> None:
    import torch

    torch.ones(2**20).add_(1)


# It warns, where nothing is in four bits, of a kernel that it did not find, as soon as PEFT imports it.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Before torch is loaded, which reads it.
if _threads := openmp.set_waiting(os.environ):
    openmp.watch(_threads, _run_in_parallel)
