"""What a LoRA can stand on in a model, as PEFT and folding see it."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN, get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from stackctl.core.schema import ModuleShape
from stackctl.lora.target_parameters import CONVERTED_NAMES

_READ = {"dt_proj": "MambaMixer", "classifier": "LongcatFlashTopkRouter", "ngram_embeddings": "ProphetNetDecoder"}
"""Modules whose weight is read and who are not called, with how the class is called that does so in transformers."""
_CALL_QUANTISED = ("FalconMambaMixer", "JambaMambaMixer")
"""Those that do call them where the model is quantised."""


def module_shapes(model: PreTrainedModel) -> dict[str, ModuleShape]:
    """What a LoRA can stand on, with the shape of its delta, in the order in which the model declares it."""
    shapes: dict[str, ModuleShape] = {}
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    users = Counter(
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module) not in embeddings
    )
    for name, module in model.named_modules():
        if shape := _shape(module):
            shapes[name] = shape
            if users[id(module.weight)] > 1:
                shapes[name] = ModuleShape(type="Shared", shape=shape.shape)
        elif "Experts" in type(module).__name__:
            kind = "TransposedExperts" if getattr(module, "is_transposed", False) else "Experts"
            for own, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:
                    experts, rows, columns = parameter.shape
                    matrix = [columns, rows] if kind == "TransposedExperts" else [rows, columns]
                    shapes[f"{name}.{own}"] = ModuleShape(type=kind, shape=[experts, *matrix])  # type: ignore[arg-type]
    return shapes


def _shape(module: nn.Module) -> ModuleShape | None:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return None
    if isinstance(module, Conv1D):
        return ModuleShape(type="Conv1D", shape=[module.nf, module.nx])
    if isinstance(module, nn.Embedding):
        return ModuleShape(type="Embedding", shape=[module.num_embeddings, module.embedding_dim])
    plain = isinstance(module, nn.Linear) and is_plain_linear(type(module))
    return ModuleShape(type="Linear" if plain else "Matrix", shape=list(weight.shape))


def is_plain_linear(kind: type[nn.Linear]) -> bool:
    """Whether a class of linear layers computes what ``nn.Linear`` does, so that a LoRA can stand beside it.

    Some inherit from it and route tokens, or multiply groups apart. A class with a ``forward`` of its own is tried.
    """
    if kind.forward is nn.Linear.forward:
        return True
    probe: nn.Linear = object.__new__(kind)
    nn.Module.__init__(probe)
    probe.in_features, probe.out_features = 3, 2
    probe.register_parameter("bias", None)
    probe.weight = nn.Parameter(torch.arange(6.0, device="cpu").view(2, 3))
    given = torch.arange(12.0, device="cpu").view(1, 4, 3)
    try:
        with torch.no_grad():
            made = probe(given)
            return isinstance(made, torch.Tensor) and torch.equal(made, functional.linear(given, probe.weight))
    except Exception:  # it wants what this one has not: it is no plain one
        return False


def is_called(model: nn.Module, name: str) -> bool:
    """Whether a model calls a module, and does not read its weight alone: what PEFT puts beside one that is not called
    has no effect.
    """
    holder, _, own = name.rpartition(".")
    if own not in _READ:
        return True
    kind = type(model.get_submodule(holder)).__name__
    if kind in _CALL_QUANTISED and hasattr(getattr(model, "config", None), "_is_quantized"):
        return True
    return not kind.endswith(_READ[own])


def computes(module: nn.Module) -> bool:
    """Whether an embedding does more than look a row up, and scale it: Muse Spark norms it. PEFT adds its change behind
    that, where a changed weight would go through it."""
    if not isinstance(module, nn.Embedding):
        return False
    return type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale")


def converted_names(model: PreTrainedModel) -> list[str]:
    """Last names of linear layers that PEFT adapts as parameters only: see CONVERTED_NAMES."""
    kind = getattr(model.config, "model_type", None)
    if kind is None or get_checkpoint_conversion_mapping(kind) is None:
        return []
    pattern = "mixtral" if kind == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(kind, "")
    return list(CONVERTED_NAMES.get(pattern, ()))


def text_modules(model: PreTrainedModel) -> set[str]:
    """The names of the modules that text goes through: all of them, or those of the decoder beside a tower."""
    names = {id(module): name for name, module in model.named_modules()}
    if model.config.get_text_config(decoder=True) is model.config:
        return set(names.values())
    inside = names.get(id(model.get_decoder()), "")
    output = model.get_output_embeddings()
    keep = {name for name in names.values() if not inside or name == inside or name.startswith(f"{inside}.")}
    return keep | ({names[id(output)]} if output is not None else set())
