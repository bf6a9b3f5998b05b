"""mlx-lm's adapters as PEFT's checkpoints: every factor the other way round, and nothing computed."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from stackctl.engine.tensors import TensorFiles
from stackctl.lora.checkpoint import CONFIG, WEIGHTS
from stackctl.lora.mlx import MLX_WEIGHTS, MlxAdapter
from stackctl.storage import atomic


def write_peft(adapter: MlxAdapter, folder: Path) -> None:
    """Write an adapter of mlx-lm as the same adapter of PEFT, in the same dtype."""
    made = {}
    with TensorFiles() as files:
        for module, parts in adapter.tensors.items():
            for part, info in parts.items():
                tensor = files.read(adapter.path / MLX_WEIGHTS, info)
                made[adapter.peft_name(module, part)] = (tensor if part == "m" else tensor.T).contiguous()
    save_file(made, folder / WEIGHTS, {"format": "pt"})
    atomic.write_atomic(folder / CONFIG, json.dumps(adapter.peft_config(), indent=2, sort_keys=True) + "\n")
