"""What torch can compute on here, and what is chosen of it: the device, the precision, an optimizer."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stackctl.core.errors import Incompatible, first_line
from stackctl.core.schema import Base
from stackctl.jobs import ranks
from stackctl.machine.memory_estimate import QUANTISED_FROM
from stackctl.machine.resources import cores, main_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def describe_devices() -> list[dict[str, Any]]:
    """Every device, the one that ``auto`` takes first: ``type``, ``name``, ``memory`` and ``free`` in bytes, and
    ``bfloat16``: whether it multiplies that in hardware.
    """
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, fast = torch.cuda.get_device_name(index), torch.cuda.is_bf16_supported(including_emulation=False)
        found.append({"type": "cuda", "name": name, "memory": total, "free": free, "bfloat16": fast})
    memory = main_memory()
    shared = {"memory": memory.total, "free": memory.available}
    if torch.backends.mps.is_available():
        found.append({"type": "mps", "name": "Apple GPU", **shared, "bfloat16": True})
    fast = cpu_multiplies_bfloat16()
    found.append({"type": "cpu", "name": f"{cores()} cores", **shared, "bfloat16": fast})
    return found


def choose_device(name: str = "auto") -> torch.device:
    """``auto`` is CUDA, else MPS, else the CPU.

    Raises:
        Incompatible: the device that was asked for is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise Incompatible(f"this machine has no {name} device", hint="use --device auto")
    return torch.device(name, ranks.local_rank()) if name == "cuda" and ranks.is_launched() else torch.device(name)


def choose_dtype(name: str, device: torch.device, base: Base) -> torch.dtype:
    """``auto`` is float32 on a CPU, else the base's own half precision; so is what nf4 leaves as it is."""
    if name not in ("auto", "nf4"):
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else DTYPES.get(base.dtype, torch.float32)


def exact_device(device: torch.device) -> torch.device:
    """Where to compute in float64 what is on a device: there, but for MPS, which has none."""
    return torch.device("cpu") if device.type == "mps" else device


def float64(tensor: Tensor) -> Tensor:
    """A tensor in float64, on :func:`exact_device`: moved first, for a copy from MPS would convert it there."""
    return tensor.to(exact_device(tensor.device)).double()


def widest_dtype() -> torch.dtype:
    """float64, or float32 where tensors may go to MPS, which has none."""
    return torch.float32 if torch.backends.mps.is_available() else torch.float64


def generators_of(device: torch.device) -> list[torch.device]:
    """The devices, besides the CPU, whose random numbers a computation on ``device`` draws: for ``fork_rng``, which
    would begin to use every GPU there is."""
    return [device] if device.type == "cuda" else []


_WIDE = 256
"""Hidden size from which on casting to bfloat16 costs less than its faster products save."""


def computes_in_bfloat16(dtype: str, device: torch.device, model: PreTrainedModel) -> bool:
    """Whether to train under bfloat16 autocast: where a device multiplies it in hardware.

    On a CPU that is for float32 weights when nothing else was asked for, toy models apart; on CUDA also over a base in
    bfloat16 or nf4, whose adapter would be multiplied in float32 otherwise. The adapter and the optimizer stay in
    float32. Measured on a CPU with AVX512-BF16: 1.9 times the speed.
    """
    if device.type == "cuda":
        fits = dtype in ("auto", "bfloat16", "nf4") and model.dtype in (torch.float32, torch.bfloat16)
    else:
        fits = dtype == "auto" and model.dtype == torch.float32
    return fits and multiplies_in_bfloat16(device, getattr(model.config.get_text_config(), "hidden_size", 0))


def multiplies_in_bfloat16(device: torch.device, hidden_size: int) -> bool:
    """Whether casting to bfloat16 pays: on CUDA with it in hardware, on such a CPU for matrices that are not small."""
    if device.type == "cuda":
        fast: bool = torch.cuda.is_bf16_supported(including_emulation=False)
        return fast
    if device.type != "cpu" or hidden_size < _WIDE:
        return False
    return cpu_multiplies_bfloat16()


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has AMX tiles or AVX512-BF16."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def check_kernels(optimizer: str) -> None:
    """Take one step with an optimizer of bitsandbytes on this run's device, before any work begins.

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
