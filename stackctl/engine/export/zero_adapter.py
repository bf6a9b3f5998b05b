"""A LoRA that adds nothing: the base, for a program whose every row has to have an adapter."""

from __future__ import annotations

from pathlib import Path

import torch

from stackctl.core.errors import Incompatible
from stackctl.engine.to_lora.low_rank import LowRankPairs
from stackctl.lora.target_modules import expand_modules
from stackctl.plan.stack_plan import StackPlan
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
            nothing = LowRankPairs({name: (torch.zeros(1, columns), torch.zeros(rows, 1))})
            with atomic.staging_directory(out.parent) as staged:
                nothing.write(staged, base, {})
                atomic.publish_directory(staged, out)
            return
    raise Incompatible(f"'{base.name}' has no linear layer")
