"""The tensors of a plan's members, read from their files as they are needed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from stackctl.checkpoint import TensorInfo
from stackctl.engine import algebra
from stackctl.errors import VerificationFailed
from stackctl.plan import ModulePlan, StackPlan


class MemberTensors:
    """Reads the members' tensors of a plan, each file mapped once; every tensor read is checked to be finite."""

    def __init__(self, plan: StackPlan) -> None:
        self._plan = plan
        self._files: dict[int, Any] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> MemberTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.clear()
        self._stack.close()

    def read(self, member: int, info: TensorInfo) -> Tensor:
        """One tensor as it is stored.

        Raises:
            VerificationFailed: it holds NaN or infinity.
        """
        if member not in self._files:
            path = self._plan.members[member].checkpoint.weights_path
            self._files[member] = self._stack.enter_context(safe_open(path, "pt"))
        tensor: Tensor = self._files[member].get_tensor(info.name)
        if not bool(torch.isfinite(tensor).all()):
            label = self._plan.members[member].label
            raise VerificationFailed(
                f"{label} holds values that are not finite numbers, in {info.name}",
                hint=f"use an earlier version, or train {self._plan.members[member].adapter or label} again",
            )
        return tensor

    def factors(self, module: ModulePlan, device: torch.device | None = None) -> list[algebra.Factors]:
        """A module's (A, B, weight · scaling), one for each member on it."""
        return [
            (
                self.read(factor.member, factor.a).to(device=device, dtype=torch.float32),
                self.read(factor.member, factor.b).to(device=device, dtype=torch.float32),
                self._plan.members[factor.member].weight * factor.scaling,
            )
            for factor in module.factors
        ]
