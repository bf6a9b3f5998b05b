"""Add a delta to a weight in place, a block of rows at a time, and measure what rounding took of it.

Blocks that fit a core's cache are several times as fast as whole matrices, and the memory needed beside the weight is
that of a block, however large the matrix is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stackctl.engine import algebra
from stackctl.engine.merging import combine, matrices
from stackctl.plan.model import ModulePlan, StackPlan

_BLOCK = 1 << 18
"""Elements of a block on a CPU, a megabyte in float32."""
_LARGE_BLOCK = 1 << 25
"""On a device, where starting a kernel costs more than its memory."""


@dataclass
class Rounding:
    """Squared norms over everything that was folded: of what rounding took, and of the deltas."""

    lost: float = 0.0
    total: float = 0.0

    @property
    def error(self) -> float:
        """‖what the weights gained - ΔW‖ / ‖ΔW‖."""
        return (self.lost / self.total) ** 0.5 if self.total else 0.0


@dataclass(frozen=True)
class Delta:
    """A module's change as its weight is stored: ``left`` (rows, k) @ ``right`` (k, columns), or ``left`` alone."""

    left: Tensor
    right: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], (self.left if self.right is None else self.right).shape[1]

    def rows(self, start: int, end: int) -> Tensor:
        """Some rows of the change, in float32."""
        return self.left[start:end] if self.right is None else self.left[start:end] @ self.right


def deltas_of(
    plan: StackPlan, module: ModulePlan, factors: Sequence[algebra.Factors], device: torch.device
) -> Iterator[Delta]:
    """A module's change by the plan's method, for each of its matrices, the way round in which the weight is stored."""
    for own in matrices(module, factors):
        made = combine(plan, module, own)
        a, b = (None, made) if isinstance(made, Tensor) else made
        if not module.is_transposed:
            yield Delta(b.to(device), None if a is None else a.to(device))
        elif a is None:
            yield Delta(b.T.to(device), None)
        else:
            yield Delta(a.T.to(device), b.T.to(device))


def add_delta(weight: Tensor, delta: Delta, rounding: Rounding) -> None:
    """Add a change (rows, columns) to a weight of the same shape: summed in float32 and rounded once."""
    rows, columns = weight.shape
    step = max(1, (_BLOCK if weight.device.type == "cpu" else _LARGE_BLOCK) // columns)
    for start in range(0, rows, step):
        block = weight[start : start + step]
        change = delta.rows(start, start + step)
        if block.dtype == torch.float32:
            after = block + change
            gained = after - block
            lost = (block - (after - gained)) + (change - gained)  # exact: Knuth's two-sum (TAOCP 4.2.2)
        else:
            exact = block.float() + change
            after = exact.to(block.dtype)
            lost = exact - after.float()
        block.copy_(after)
        rounding.lost += float(torch.linalg.vector_norm(lost)) ** 2
        rounding.total += float(torch.linalg.vector_norm(change)) ** 2
