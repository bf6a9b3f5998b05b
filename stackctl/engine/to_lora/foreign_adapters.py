"""Adapters of other programs as PEFT's checkpoints: the same factors by other names, and nothing computed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from stackctl.core.errors import VerificationFailed
from stackctl.engine.tensors import TensorFiles
from stackctl.lora.checkpoint import CONFIG, WEIGHTS
from stackctl.lora.kohya import KohyaAdapter
from stackctl.lora.mlx import MLX_WEIGHTS, MlxAdapter
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.storage import atomic


def write_mlx_as_peft(adapter: MlxAdapter, folder: Path) -> None:
    """Write an adapter of mlx-lm as the same adapter of PEFT, in the same dtype."""
    _write(folder, adapter.path / MLX_WEIGHTS, adapter.peft_tensors(), adapter.peft_config())


def write_kohya_as_peft(adapter: KohyaAdapter, folder: Path) -> None:
    """Write an adapter of sd-scripts or LyCORIS as the same adapter of PEFT, in the same dtype.

    Raises:
        VerificationFailed: an alpha is no finite number.
    """
    with TensorFiles() as files:
        alphas = {
            module: float(files.read(adapter.path, parts["alpha"]).item())
            for module, parts in adapter.tensors.items()
            if "alpha" in parts
        }
    if odd := [module for module, alpha in alphas.items() if not math.isfinite(alpha)]:
        raise VerificationFailed(
            f"{adapter.path}: the alpha of {odd[0]} is not a finite number", hint="get it again from where it was made"
        )
    _write(folder, adapter.path, adapter.peft_tensors(), adapter.peft_config(alphas))


def _write(
    folder: Path, weights: Path, tensors: Mapping[str, tuple[TensorInfo, bool]], config: Mapping[str, Any]
) -> None:
    made = {}
    with TensorFiles() as files:
        for name, (info, turned) in tensors.items():
            tensor = files.read(weights, info)
            made[name] = (tensor.T if turned else tensor).contiguous()
    save_file(made, folder / WEIGHTS, {"format": "pt"})
    atomic.write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
