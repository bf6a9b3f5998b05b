"""A LoRA out of a full fine-tune: for every linear layer the best pair of a rank for what training changed.

A layer of each model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from stackctl.core.errors import Incompatible
from stackctl.core.schema import Base, ModuleShape
from stackctl.engine.base_class import empty_model
from stackctl.engine.base_files import base_folder, make_base
from stackctl.engine.base_layout import BaseLayout
from stackctl.engine.low_rank import Pairs, Wanted
from stackctl.engine.tensors import TensorFiles
from stackctl.lora.target_modules import expand_modules
from stackctl.registry.store import Registry

Say = Callable[[str], None]


@dataclass
class Extraction(Pairs):
    """What came out of two models. ``left_out`` are parameters that changed and are not kept."""

    left_out: list[str] = field(default_factory=list)


def find_tuned(base: Base, source: str, registry: Registry, say: Say) -> tuple[Base, Path]:
    """A fine-tuned model and its folder, held against the base by what both say of their layers.

    Raises:
        NotFound, Usage, Incompatible, HubFailure: it is not there, or is no model of the same layers.
    """
    tuned = make_base("tuned", source, None, registry, say)
    hint = "give the model that was trained from that base, or another --base"
    if base.quantization or tuned.quantization:
        which = base.name if base.quantization else source
        raise Incompatible(
            f"the weights of {which} are stored quantised, and a change cannot be read off them", hint=hint
        )
    ours, theirs = expand_modules(base.modules), expand_modules(tuned.modules)
    other = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if other or tuned.architecture != base.architecture:
        what = f"{len(other)} layers differ, {other[0]} among them" if other else f"it is a {tuned.architecture}"
        raise Incompatible(f"{source} is no fine-tune of '{base.name}': {what}", hint=hint)
    if tuned.fingerprint == base.fingerprint:
        raise Incompatible(f"{source} is the base '{base.name}' itself: nothing was changed", hint=hint)
    return tuned, base_folder(tuned, registry, say)


def extract(base: Base, folder: Path, tuned: Path, wanted: Wanted) -> Extraction:
    """Compare two models of the same layers, parameter by parameter.

    Raises:
        Incompatible: no linear layer was changed.
    """
    found = Extraction()
    modules = expand_modules(base.modules)
    tied = f"{base.output_embedding}.weight" if base.tied_embeddings else None
    before, after = (BaseLayout(place, empty_model(place)) for place in (folder, tuned))
    with torch.no_grad(), TensorFiles() as ours, TensorFiles() as theirs:
        for group in before.groups:
            other = after.group(group.targets[0])
            if other is None:
                found.left_out.extend(group.targets)
                continue
            new = after.read_group(other, theirs)
            for name, old in before.read_group(group, ours).items():
                if name == tied or (torch.equal(old, new[name].to(old.dtype)) and old.dtype == new[name].dtype):
                    continue
                _keep(found, base, name, modules, (old, new.pop(name)), wanted)
    for module in found.biases.keys() - found.pairs.keys():  # PEFT keeps those of layers that it adapts
        del found.biases[module]
        found.left_out.append(f"{module}.bias")
    if not found.pairs:
        raise Incompatible(
            "no linear layer differs between the two models"
            + (f" (but {', '.join(found.left_out[:3])})" if found.left_out else ""),
            hint="give a model whose linear layers were trained",
        )
    found.saved_modules = sorted({name.rpartition(".")[0] for name in found.saved})
    return found


def _keep(
    found: Extraction,
    base: Base,
    name: str,
    modules: dict[str, ModuleShape],
    models: tuple[Tensor, Tensor],
    wanted: Wanted,
) -> None:
    """What is kept of one parameter that changed."""
    old, new = models
    module, _, kind = name.rpartition(".")
    shape = modules.get(module)
    type_ = shape.type if shape else None
    untied = () if base.tied_embeddings else (base.input_embedding, base.output_embedding)
    if kind == "weight" and type_ in ("Linear", "Conv1D") and module != base.output_embedding:
        delta = new.float() - old.float()
        found.keep(module, delta.T if type_ == "Conv1D" else delta, wanted)
    elif kind == "bias" and type_ in ("Linear", "Conv1D") and module != base.output_embedding:
        found.biases[module] = new.contiguous()
    elif (type_ is None and kind in ("weight", "bias")) or (kind == "weight" and module in untied):  # a norm, a table
        found.saved[name] = new.contiguous()
    else:
        found.left_out.append(name)
