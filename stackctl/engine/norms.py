"""How large a stack's deltas are, module by module, from the factors alone."""

from __future__ import annotations

from typing import Any

import torch

from stackctl.engine import algebra
from stackctl.engine.tensors import MemberTensors
from stackctl.plan.model import StackPlan


def module_norms(plan: StackPlan) -> list[dict[str, Any]]:
    """Frobenius norms per module: of every member's weighted delta, and of their exact sum.

    Nothing of the size of a delta is formed: ‖BA‖² = trace((BᵀB)(AAᵀ)).
    """
    rows = []
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            factors = tensors.factors(module)
            members = {
                plan.members[planned.member].label: abs(scale) * algebra.product_norm(A, B)
                for planned, (A, B, scale) in zip(module.factors, factors, strict=True)
            }
            total = algebra.product_norm(*algebra.concatenate(factors))
            rows.append({"module": module.name, "norm": total, "members": members})
    return rows
