"""The exact sum in float32 as bytes to write, without torch, whose import takes longer than the sum of a small stack.

The same numbers as :func:`stackctl.engine.algebra.concatenate`, bit for bit: every factor is read to where it stands
in the sum, and scaled there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from stackctl.core.errors import VerificationFailed
from stackctl.engine.open_files import OpenFiles, not_finite
from stackctl.lora.naming import ExpertFactors
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.plan.stack_plan import ModulePlan, StackPlan

_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class Concatenation(OpenFiles):
    """The factors of a plan's exact sum, module by module."""

    def __init__(self, plan: StackPlan) -> None:
        super().__init__()
        self._plan = plan

    def pair(self, module: ModulePlan) -> tuple[memoryview, memoryview]:
        """A (Σ rank, in) and B (out, Σ rank) of a module, in float32.

        Raises:
            VerificationFailed: a member's tensor holds NaN or infinity, or the scaled values do not fit float32.
        """
        all_a, all_b = zip(*self._factors(module), strict=True)
        experts, (rows, columns) = module.experts, module.shape
        if module.is_experts:  # each expert's ranks together: see stackctl.lora.target_parameters
            a = np.concatenate([factor.reshape(experts, -1, columns) for factor in all_a], 1).reshape(-1, columns)
            b = np.concatenate([factor.reshape(rows, -1, experts) for factor in all_b], 1).reshape(rows, -1)
        else:
            a, b = np.concatenate(all_a, 0), np.concatenate(all_b, 1)
        for factor in (a, b):
            if not _all_finite(factor):
                self._blame(module)
        return a.data.cast("B"), b.data.cast("B")

    def _factors(self, module: ModulePlan) -> Iterator[tuple[Any, Any]]:
        """Each member's share of A and B: √|s| of its scale, and the sign with B."""
        for factor in module.factors:
            scale = factor.weight * factor.scaling
            root = abs(scale) ** 0.5
            yield (
                self._scaled(factor.member, factor.a, root),
                self._scaled(factor.member, factor.b, math.copysign(root, scale)),
            )

    def _scaled(self, member: int, info: TensorInfo | ExpertFactors, scale: float) -> Any:
        values = self._read(member, info)
        with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at
            values = values.astype(np.float32, copy=False)
            return values if scale == 1 else np.multiply(values, np.float32(scale), out=values)

    def _read(self, member: int, info: TensorInfo | ExpertFactors) -> Any:
        """A member's tensor; of bfloat16, which numpy lacks, as the float32 that it is the upper half of."""
        if isinstance(info, ExpertFactors):
            return info.join(lambda shape: np.zeros(shape, np.float32), lambda part: self._read(member, part))
        values: Any = np.empty(info.shape, _STORED[info.dtype])
        self.read_into(self._plan.members[member].checkpoint.weights_path, info, memoryview(values).cast("B"))
        return (values.astype("<u4") << 16).view("<f4") if info.dtype == "BF16" else values

    def _blame(self, module: ModulePlan) -> None:
        for factor in module.factors:
            for info in (factor.a, factor.b):
                if not np.isfinite(self._read(factor.member, info)).all():
                    raise not_finite(self._plan, factor.member, info)
        raise VerificationFailed(
            f"the factors of {module.name} do not fit float32", hint="give the member a smaller weight"
        )


def _all_finite(values: Any) -> bool:
    """Whether there is neither NaN nor infinity: both would be in the sum; every value is looked at if it overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum())) or bool(np.isfinite(values).all())
