"""Copies of the base's weights in a checkpoint: PEFT saves them beside a LoRA on an embedding or head, and loads them.

Where they are those of the registered base they say nothing new. Where they are others, the adapter works on them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from stackctl.core.errors import Incompatible
from stackctl.core.schema import Base
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.base.model_class import quantised_skeleton
from stackctl.engine.tensors import TensorFiles
from stackctl.lora.checkpoint import Checkpoint
from stackctl.lora.naming import naming_of
from stackctl.lora.target_modules import expand_modules


def check_copies(checkpoint: Checkpoint, base: Base, folder: Path) -> None:
    """Hold the copies in a checkpoint against the base in ``folder``.

    Raises:
        Incompatible: they differ by more than the rounding of the narrower dtype, or have another shape.
    """
    naming = naming_of(checkpoint, base, expand_modules(base.modules))
    layout = BaseLayout(folder, *quantised_skeleton(folder, torch.float32))
    with TensorFiles() as files:
        for module, info in checkpoint.copies.items():
            parameter = f"{naming.place(module).module}.weight"
            if layout.group(parameter) is None:  # a tied head, stored as its twin
                parameter = f"{base.input_embedding}.weight"
            ((_, own),) = layout.read({parameter})
            copy = files.read(checkpoint.weights_path, info)
            if not _alike(copy, own):
                raise Incompatible(
                    f"{checkpoint.path} has a {module} of its own under its adapter ({info.name}), which is not that "
                    f"of '{base.name}'",
                    hint="register the base that it was trained on, with that weight, and add it there",
                )


def _alike(copy: Tensor, own: Tensor) -> bool:
    if copy.shape != own.shape:
        return False
    narrow = max(copy.dtype, own.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    found, wanted = copy.float(), own.float()
    step = torch.finfo(narrow).eps * wanted.abs() + torch.finfo(narrow).smallest_normal
    return bool(((found - wanted).abs() <= step).all())
