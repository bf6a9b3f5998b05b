"""``--orthogonal``: the new adapter reads only what the frozen stack does not.

On every module the rows of the new A begin in the orthogonal complement of the row space of the frozen stack's deltas,
and stay there: the gradient is projected before each step of the optimizer, and A after it, since AdamW moves each
entry at a pace of its own and so leaves any subspace. It is the constraint of O-LoRA (https://arxiv.org/abs/2310.14152)
and OPLoRA (https://arxiv.org/abs/2510.13003), kept exactly instead of by a penalty. Every process projects the same
numbers in the same way, so that ranks stay equal; what is resumed was projected when it was saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackctl.engine import algebra
from stackctl.engine.live_adapter import layer_factors
from stackctl.engine.merging import matrices
from stackctl.engine.tensors import MemberTensors
from stackctl.engine.training.adapter import ADAPTER, new_layers
from stackctl.plan.stack_plan import StackPlan


class OrthogonalRows(TrainerCallback):
    """Keeps each A of the adapter in training orthogonal to what the frozen stack reads on its module."""

    def __init__(self, model: PeftModel, plan: StackPlan) -> None:
        """Project the new A's, which are (rank, in), of experts (experts · rank, in); ``plan`` is the stack's."""
        self._bases: list[tuple[nn.Parameter, list[Tensor]]] = []
        own = {name: layer_factors(layer, ADAPTER)[0] for name, layer in new_layers(model)}
        with torch.no_grad(), MemberTensors(plan) as tensors:
            for module in plan.modules.values():
                if (parameter := own.get(module.name)) is not None:
                    exact = torch.float32 if parameter.device.type == "mps" else torch.float64  # MPS has no float64
                    read = [_read(matrix) for matrix in matrices(module, tensors.factors(module))]
                    self._bases.append((parameter, [basis.to(parameter.device, exact) for basis in read]))
        for parameter, bases in self._bases:
            _project(parameter, bases)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for parameter, bases in self._bases:
            if parameter.grad is not None:
                _project(parameter.grad, bases)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        for parameter, bases in self._bases:
            _project(parameter, bases)


@torch.no_grad()
def _project(rows: Tensor, bases: list[Tensor]) -> None:
    """Take out of ``rows``, those of one expert after those of another, their part in the span of its basis (in, k)."""
    for own, basis in zip(rows.chunk(len(bases)), bases, strict=True):
        exact = own.to(basis.dtype)
        own.copy_(exact - (exact @ basis) @ basis.T)


def _read(factors: Sequence[algebra.Factors]) -> Tensor:
    """An orthonormal basis (n, k) of the row spaces of some deltas together, in float64."""
    spaces = []
    for a, b, scale in factors:
        if scale:
            _, _, sigma, v, q_a = algebra.thin_svd(a, b)
            spaces.append((q_a @ v)[:, algebra.is_more_than_rounding(sigma)].double())
    if not spaces:
        return torch.zeros(factors[0][0].shape[1], 0, dtype=torch.float64)
    u: Tensor
    u, sigma, _ = torch.linalg.svd(torch.cat(spaces, dim=1), full_matrices=False)
    return u[:, algebra.is_more_than_rounding(sigma)]
