"""A stack's pairs by any method and in any precision, each measured against the exact sum."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from stackctl.engine.merging import module_pair, pair_error
from stackctl.engine.tensors import TORCH_DTYPES, MemberTensors, tensor_bytes
from stackctl.plan.model import ModulePlan, StackPlan


def found_ranks(plan: StackPlan) -> dict[str, int]:
    """The rank that a method which looks at the tensors for it gives every module."""
    with torch.no_grad(), MemberTensors(plan) as tensors:
        return {
            name: module_pair(plan, module, tensors.factors(module))[0].shape[0] // module.experts
            for name, module in plan.modules.items()
        }


def made_pairs(plan: StackPlan, dtype: str) -> Iterator[tuple[ModulePlan, tuple[memoryview, memoryview], float]]:
    """Every module with its A (rank, in) and B (out, rank) as bytes of a safetensors dtype, and their relative error.

    Raises:
        VerificationFailed: a member's tensor is not finite, or a value does not fit the dtype.
    """
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            factors = tensors.factors(module)
            a, b = (factor.to(TORCH_DTYPES[dtype]) for factor in module_pair(plan, module, factors))
            error = pair_error(module, factors, (a.float(), b.float()))
            yield module, (tensor_bytes(module.name, a), tensor_bytes(module.name, b)), error
