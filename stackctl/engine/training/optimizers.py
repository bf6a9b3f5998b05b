"""Whether an optimizer's kernels run on this device: one step is taken before any work begins."""

from __future__ import annotations

import importlib.metadata

import torch

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.devices import choose_device
from stackctl.machine.memory_estimate import QUANTISED_FROM


def check_kernels(optimizer: str) -> None:
    """Try an optimizer of bitsandbytes on this run's device.

    Raises:
        Incompatible: it cannot be used here, and why.
    """
    if optimizer == "adamw":
        return
    device = choose_device()
    paged = optimizer.startswith("paged")
    if paged and device.type != "cuda":
        raise Incompatible(
            f"--optimizer {optimizer} moves its state between a GPU's memory and main memory, and this run is on "
            f"{device.type}",
            hint="use --optimizer adamw-8bit, which needs no more",
        )
    try:
        from bitsandbytes.optim.adamw import AdamW

        parameter = torch.nn.Parameter(torch.zeros(QUANTISED_FROM, device=device))
        parameter.grad = torch.ones_like(parameter)
        tried = AdamW([parameter], lr=0.1, optim_bits=8, is_paged=paged)
        tried.step()
        kept = getattr(tried.state[parameter].get("state1"), "dtype", None)
        works = kept == torch.uint8 and bool((parameter < 0).all())
        why = "" if works else "a step did not do what it should"
    except Exception as error:  # whatever a missing library or kernel raises
        why = first_line(error)
    if why:
        version = importlib.metadata.version("bitsandbytes")
        raise Incompatible(
            f"--optimizer {optimizer}: bitsandbytes {version} has no kernel for it on {device.type} ({why})",
            hint="leave out --optimizer",
        )
