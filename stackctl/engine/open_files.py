"""Files that stay open to read tensors from, as bytes by their place in the file. No torch.

Not mapped: a mapped file counts as memory once it was touched, and an export shall need no more than one module.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

from stackctl.core.errors import VerificationFailed
from stackctl.lora.naming import ExpertFactors
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.plan.stack_plan import StackPlan


class OpenFiles(contextlib.ExitStack):
    """Open files to read from; each is opened once, and closed at the end of the block."""

    def __init__(self) -> None:
        super().__init__()
        self._files: dict[Path, BinaryIO] = {}

    def read_into(self, path: Path, info: TensorInfo, buffer: memoryview, offset: int = 0) -> None:
        """Fill ``buffer`` with a tensor's bytes, from its byte ``offset`` on.

        Raises:
            VerificationFailed: they are not there.
        """
        stream = self._files.get(path)
        if stream is None:
            stream = self._files[path] = self.enter_context(path.open("rb"))
        stream.seek(info.start + offset)
        if stream.readinto(buffer) != len(buffer):  # type: ignore[attr-defined]
            raise VerificationFailed(f"{path} ends within {info.name}", hint="restore the file from where it came")


def not_finite(plan: StackPlan, member: int, info: TensorInfo | ExpertFactors) -> VerificationFailed:
    """The error of a member whose tensor holds NaN or infinity."""
    label = plan.members[member].label
    return VerificationFailed(
        f"{label} holds values that are not finite numbers, in {info.name}",
        hint=f"use an earlier version, or train {plan.members[member].adapter or label} again",
    )
