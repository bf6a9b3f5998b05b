"""Tensors read from safetensors files, one at a time, whether their values are finite, and as bytes again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from stackctl.core.errors import VerificationFailed
from stackctl.engine import algebra
from stackctl.engine.open_files import OpenFiles, not_finite
from stackctl.lora.naming import ExpertFactors
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.plan.stack_plan import ModulePlan, StackPlan

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""The dtypes of safetensors as torch calls them."""


def tensor_bytes(name: str, tensor: Tensor) -> memoryview:
    """A tensor's values as safetensors stores them; a view where the tensor is contiguous and in memory.

    Raises:
        VerificationFailed: it holds NaN or infinity, which it got by not fitting its dtype.
    """
    if not all_finite(tensor):
        raise misfit(name, str(tensor.dtype).removeprefix("torch."))
    data = tensor.detach().cpu().contiguous().flatten()
    return data.view(torch.uint8).numpy().data if data.numel() else memoryview(b"")


class TensorFiles(OpenFiles):
    """Open files to read tensors from."""

    def read(self, path: Path, info: TensorInfo) -> Tensor:
        """One tensor, in memory of its own.

        Raises:
            VerificationFailed: its bytes are not there.
        """
        data = bytearray(info.end - info.start)
        self.read_into(path, info, memoryview(data))
        if not data:
            return torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
        return torch.frombuffer(data, dtype=TORCH_DTYPES[info.dtype]).reshape(info.shape)


class MemberTensors(TensorFiles):
    """The tensors of a plan's members; every one that is read is checked to be finite."""

    def __init__(self, plan: StackPlan) -> None:
        super().__init__()
        self._plan = plan

    def of(self, member: int, info: TensorInfo | ExpertFactors) -> Tensor:
        """One tensor of a member as it is stored; factors of single experts joined, in float32.

        Raises:
            VerificationFailed: it holds NaN or infinity.
        """
        if isinstance(info, ExpertFactors):
            joined: Tensor = info.join(torch.zeros, lambda part: self.of(member, part).float())
            return joined
        tensor = self.read(self._plan.members[member].checkpoint.weights_path, info)
        if not all_finite(tensor):
            raise not_finite(self._plan, member, info)
        return tensor

    def factors(self, module: ModulePlan, device: torch.device | None = None) -> list[algebra.Factors]:
        """A module's (A, B, weight · scaling), one for each member on it, in float32."""
        return [
            (
                self.of(factor.member, factor.a).to(device=device, dtype=torch.float32),
                self.of(factor.member, factor.b).to(device=device, dtype=torch.float32),
                factor.weight * factor.scaling,
            )
            for factor in module.factors
        ]


def without_ruled_out(logits: Tensor) -> Tensor:
    """Logits with zeros where a model writes the lowest number there is, so that a token is never taken, as Chameleon
    does with images: beside that number every difference is none."""
    return logits.masked_fill(logits == torch.finfo(logits.dtype).min, 0.0)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    One fast pass: a sum carries both along. Only where the sum is not finite, which finite values can overflow to,
    is every value looked at, many times as slow.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def misfit(name: str, dtype: str) -> VerificationFailed:
    """What is said of values that are no numbers in ``dtype``: the widest that there is takes smaller weights alone."""
    hint = "give the members smaller weights" if dtype == "float32" else "use --dtype float32"
    return VerificationFailed(f"{name} does not fit {dtype}", hint=hint)


@contextlib.contextmanager
def decomposing(name: str, factors: Sequence[algebra.Factors]) -> Iterator[None]:
    """Around decompositions of what a module's factors make, which fail in many words where that is no number.

    Raises:
        VerificationFailed: it does not fit float32.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        largest = max(float(a.abs().max()) * float(b.abs().max()) * abs(scale) for a, b, scale in factors)
        if largest <= torch.finfo(torch.float32).max:
            raise
        raise misfit(name, "float32") from error
