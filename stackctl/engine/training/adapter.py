"""The adapter in training: its parameters, their names, and how they become a PEFT checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stackctl.engine.training.distributed import full_tensor
from stackctl.lora.checkpoint import CONFIG, WEIGHTS
from stackctl.lora.target_parameters import without_wrappers

ADAPTER = "default"
"""The name inside PEFT of the adapter in training; PEFT saves that one at a folder's root."""
_WRAPPER = "_checkpoint_wrapped_module."
"""What accelerate's activation checkpointing puts into the names of everything inside a layer."""


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the adapter in training, by the names that they have in a checkpoint."""
    return {name.replace(f".{ADAPTER}", "").replace(_WRAPPER, ""): p for name, p in trained_parameters(model)}


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter in training by its names in the model; where it is sharded, every rank has to ask."""
    return {name: full_tensor(p.detach()) for name, p in trained_parameters(model)}


def trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """What learns, with its names in the model as it is wrapped."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def new_layers(model: PeftModel) -> Iterator[tuple[str, LoraLayer]]:
    """PEFT's layers of the adapter in training, with the full names of what they stand on."""
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer) and (ADAPTER in layer.lora_A or ADAPTER in layer.lora_embedding_A):
            holder = without_wrappers(name)
            parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
            yield (holder if parameter == "weight" else f"{holder}.{parameter}"), layer


def save_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor]) -> None:
    """Write :func:`adapter_state` as a PEFT checkpoint at ``folder``'s root, in float32."""
    card = folder / "README.md"  # PEFT's template, compiled anew each time where none is there; ours is made by push
    folder.mkdir(parents=True, exist_ok=True)
    card.write_text("---\nlibrary_name: peft\n---\n")
    model.save_pretrained(
        str(folder), selected_adapters=[ADAPTER], save_embedding_layers=False, safe_serialization=True, state_dict=state
    )
    if any(_WRAPPER in name for name in state):  # PEFT finds tensors by the wrapped names only, and writes those
        tensors = load_file(folder / WEIGHTS)
        save_file({name.replace(_WRAPPER, ""): t for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config = folder / CONFIG
    settings = json.loads(config.read_text())
    for key in ("target_modules", "target_parameters"):  # sets inside PEFT, and so in another order in each process
        if isinstance(settings.get(key), list):
            settings[key].sort()
    config.write_text(json.dumps(settings, indent=2, sort_keys=True))
    card.unlink()
