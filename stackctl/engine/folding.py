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
from stackctl.plan.stack_plan import ModulePlan, StackPlan

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

    def rows(self, start: int, end: int) -> Tensor:
        """Some rows of the change, in float32."""
        return self.left[start:end] if self.right is None else self.left[start:end] @ self.right


def deltas_of(
    plan: StackPlan, module: ModulePlan, factors: Sequence[algebra.Factors], device: torch.device
) -> Iterator[Delta]:
    """A module's change by the plan's method, for each of its matrices, the way round in which the weight is stored."""
    for own in matrices(module, factors):
        made = combine(plan, module, own)
        right, left = (None, made) if isinstance(made, Tensor) else made
        if module.is_transposed:
            left, right = (left.T, None) if right is None else (right.T, left.T)
        yield Delta(left.to(device), None if right is None else right.to(device))


class Adder:
    """Adds changes to weights, and keeps account of what rounding takes; each block of rows uses the same memory."""

    def __init__(self) -> None:
        self.rounding = Rounding()
        self._memory: list[Tensor] = []

    def add(self, weight: Tensor, delta: Delta, base: Tensor | None = None) -> None:
        """Make a weight (rows, columns) ``base`` and a change of that shape, summed in float32 and rounded once.

        Without ``base`` it is what the weight is now.
        """
        rows, columns = weight.shape
        step = max(1, (_BLOCK if weight.device.type == "cpu" else _LARGE_BLOCK) // columns)
        for start in range(0, rows, step):
            after = weight[start : start + step]
            before = after if base is None else base[start : start + step]
            change = delta.rows(start, start + step)
            total, gained, lost = self._blocks(after)
            if base is not None and after.dtype == total.dtype:
                total = after  # the base's own values are elsewhere
            torch.add(before, change, out=total)
            if after.dtype == torch.float32:  # lost is exact: Knuth's two-sum (TAOCP 4.2.2)
                torch.sub(total, before, out=gained)
                torch.sub(total, gained, out=lost)
                torch.sub(before, lost, out=lost)
                torch.sub(change, gained, out=gained)
                lost.add_(gained)
                if total is not after:
                    after.copy_(total)
            else:
                after.copy_(total)
                torch.sub(total, after, out=lost)
            self.rounding.lost += float(torch.linalg.vector_norm(lost)) ** 2
            self.rounding.total += float(torch.linalg.vector_norm(change)) ** 2

    def _blocks(self, like: Tensor) -> list[Tensor]:
        """Three blocks in float32, of the shape and on the device of one."""
        size = like.numel()
        if not self._memory or self._memory[0].numel() < size or self._memory[0].device != like.device:
            self._memory = [torch.empty(size, device=like.device) for _ in range(3)]
        return [memory[:size].view(like.shape) for memory in self._memory]
