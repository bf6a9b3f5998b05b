"""Tensors read from safetensors files by their place in the file, one at a time.

Not mapped: a mapped file counts as memory once it was touched, and an export shall need no more than one module.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from stackctl.checkpoint import TensorInfo
from stackctl.engine import algebra
from stackctl.errors import VerificationFailed
from stackctl.plan import ModulePlan, StackPlan

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes of safetensors as torch calls them."""


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    One fast pass: a sum carries both along. Only where the sum is not finite, which finite values can overflow to,
    is every value looked at, many times as slow.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


class TensorFiles:
    """Open files to read tensors from; each is opened once."""

    def __init__(self) -> None:
        self._files: dict[Path, BinaryIO] = {}

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._files.values():
            stream.close()
        self._files.clear()

    def read(self, path: Path, info: TensorInfo) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            VerificationFailed: its bytes are not there.
        """
        stream = self._files.get(path)
        if stream is None:
            stream = self._files[path] = path.open("rb")
        data = bytearray(info.end - info.start)
        stream.seek(info.start)
        if stream.readinto(data) != len(data):  # type: ignore[attr-defined]
            raise VerificationFailed(f"{path} ends within {info.name}", hint="restore the file from where it came")
        if not data:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)


class MemberTensors(TensorFiles):
    """The tensors of a plan's members; every one that is read is checked to be finite."""

    def __init__(self, plan: StackPlan) -> None:
        super().__init__()
        self._plan = plan

    def __enter__(self) -> MemberTensors:
        return self

    def of(self, member: int, info: TensorInfo) -> Tensor:
        """One tensor of a member as it is stored.

        Raises:
            VerificationFailed: it holds NaN or infinity.
        """
        tensor = self.read(self._plan.members[member].checkpoint.weights_path, info)
        if not all_finite(tensor):
            label = self._plan.members[member].label
            raise VerificationFailed(
                f"{label} holds values that are not finite numbers, in {info.name}",
                hint=f"use an earlier version, or train {self._plan.members[member].adapter or label} again",
            )
        return tensor

    def factors(self, module: ModulePlan, device: torch.device | None = None) -> list[algebra.Factors]:
        """A module's (A, B, weight · scaling), one for each member on it, in float32."""
        return [
            (
                self.of(factor.member, factor.a).to(device=device, dtype=torch.float32),
                self.of(factor.member, factor.b).to(device=device, dtype=torch.float32),
                self._plan.members[factor.member].weight * factor.scaling,
            )
            for factor in module.factors
        ]
