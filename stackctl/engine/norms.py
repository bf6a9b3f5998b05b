"""How large a stack's deltas are, module by module, from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from stackctl.engine import algebra
from stackctl.engine.merging import matrices
from stackctl.engine.tensors import MemberTensors
from stackctl.plan.model import ModulePlan, StackPlan


def module_norms(plan: StackPlan) -> list[dict[str, Any]]:
    """Frobenius norms per module: of every member's weighted delta, and of their exact sum.

    Nothing of the size of a delta is formed: ‖BA‖² = trace((BᵀB)(AAᵀ)).
    """
    rows = []
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            factors = tensors.factors(module)
            members = {
                plan.members[planned.member].label: _norm(module, [own])
                for planned, own in zip(module.factors, factors, strict=True)
            }
            total = _norm(module, factors)
            rows.append({"module": module.name, "norm": total, "members": members})
    return rows


def _norm(module: ModulePlan, factors: Sequence[algebra.Factors]) -> float:
    """The norm of the exact sum, over all matrices of the module."""
    own = [algebra.product_norm(*algebra.concatenate(matrix)) for matrix in matrices(module, factors)]
    return math.hypot(*own)
