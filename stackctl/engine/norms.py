"""How large a stack's deltas are, module by module, from the factors alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from stackctl.engine import algebra
from stackctl.engine.merging import matrices
from stackctl.engine.tensors import MemberTensors, misfit
from stackctl.engine.token_rows import OwnRows, new_rows
from stackctl.plan.stack_plan import ModulePlan, StackPlan


def module_norms(plan: StackPlan, own: Callable[[], OwnRows] | None = None) -> list[dict[str, Any]]:
    """Frobenius norms per module: of every member's weighted delta, and of their exact sum.

    Nothing of the size of a delta is formed: ‖BA‖² = trace((BᵀB)(AAᵀ)). Of rows of single tokens it is how far they are
    from the base's own, which ``own`` makes a reader of; without it they are left out.

    Raises:
        VerificationFailed: a member's tensor is not finite, or what weights make of them does not fit float32.
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
            if not all(map(math.isfinite, [total, *members.values()])):
                raise misfit(module.name, "float32")
            rows.append({"module": module.name, "norm": total, "members": members})
        apart = _row_norms(plan, own(), tensors) if own and plan.token_rows else {}
        rows += [{"module": name, "norm": math.hypot(*by.values()), "members": by} for name, by in apart.items()]
    return rows


def _row_norms(plan: StackPlan, own: OwnRows, tensors: MemberTensors) -> dict[str, dict[str, float]]:
    """How far each member's rows are from the base's own, by module and member."""
    found: dict[str, dict[str, float]] = {}
    for rows in plan.token_rows:
        base = own(rows.module, rows.tokens).float()
        change = float((new_rows(rows, base.clone, tensors) - base).norm())
        found.setdefault(rows.module, {})[plan.members[rows.member].label] = change
    return found


def _norm(module: ModulePlan, factors: Sequence[algebra.Factors]) -> float:
    """The norm of the exact sum, over all matrices of the module."""
    own = [algebra.product_norm(*algebra.concatenate(matrix)) for matrix in matrices(module, factors)]
    return math.hypot(*own)
