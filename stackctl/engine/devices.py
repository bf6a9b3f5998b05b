"""What torch can compute on here."""

from __future__ import annotations

from typing import Any

import torch

from stackctl.machine.resources import cores, main_memory


def describe_devices() -> list[dict[str, Any]]:
    """Every device, the one that ``auto`` takes first: ``type``, ``name``, ``memory`` and ``free`` in bytes, and
    ``bfloat16``: whether it multiplies that in hardware.
    """
    found: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(
            {
                "type": "cuda",
                "name": torch.cuda.get_device_name(index),
                "memory": total,
                "free": free,
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    memory = main_memory()
    shared = {"memory": memory.total, "free": memory.available}
    if torch.backends.mps.is_available():
        found.append({"type": "mps", "name": "Apple GPU", **shared, "bfloat16": True})
    fast = cpu_multiplies_bfloat16()
    found.append({"type": "cpu", "name": f"{cores()} cores", **shared, "bfloat16": fast})
    return found


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has AMX tiles or AVX512-BF16."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
