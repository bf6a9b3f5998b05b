"""A LoRA that adds nothing: the base, for a program whose every row has to have an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from stackctl.core.errors import Incompatible
from stackctl.lora.checkpoint import CONFIG, WEIGHTS
from stackctl.lora.lora_config import plain_lora_config
from stackctl.lora.target_modules import expand_modules
from stackctl.plan.model import StackPlan
from stackctl.storage import atomic


def export_zero(plan: StackPlan, out: Path) -> None:
    """Write a plain LoRA of rank 1 with zeros, on the first linear layer that is not the head.

    Raises:
        Incompatible: the base has none.
    """
    base = plan.known_base
    for name, module in expand_modules(base.modules).items():
        if module.type == "Linear" and name != base.output_embedding:
            rows, columns = module.shape
            break
    else:
        raise Incompatible(f"'{base.name}' has no linear layer")
    prefix = f"base_model.model.{name}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.zeros(1, columns), f"{prefix}.lora_B.weight": torch.zeros(rows, 1),
    }  # fmt: skip
    with atomic.staging_directory(out.parent) as staged:
        save_file(tensors, staged / WEIGHTS, {"format": "pt"})
        atomic.write_atomic(staged / CONFIG, json.dumps(plain_lora_config({name: 1}, {}), indent=2))
        atomic.publish_directory(staged, out)
