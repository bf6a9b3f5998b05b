"""A LoRA out of a full fine-tune: for every linear layer the best pair of a rank for what training changed.

The decomposition is the randomised one of Halko, Martinsson and Tropp (https://arxiv.org/abs/0909.4061, algorithms 4.4
and 5.1) with oversampling and power iterations, exact where the matrix is small. A layer of each model is in memory at
a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from stackctl.core.errors import Incompatible
from stackctl.core.schema import Base, ModuleShape
from stackctl.engine.base_class import empty_model
from stackctl.engine.base_files import base_folder, make_base
from stackctl.engine.base_layout import BaseLayout
from stackctl.engine.tensors import TensorFiles
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, plain_lora_config
from stackctl.lora.target_modules import expand_modules
from stackctl.registry.store import Registry
from stackctl.storage import atomic

_PREFIX = "base_model.model."
_OVERSAMPLING, _ITERATIONS = 16, 4
_SMALL = 512
"""The smaller side up to which a matrix is decomposed exactly."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """How much is kept of each layer: a rank, or as many directions as leave ``tolerance`` of the change behind."""

    rank: int | None
    tolerance: float


@dataclass
class Extraction:
    """What came out of two models. ``errors`` are ‖ΔW - B A‖ / ‖ΔW‖ by module; ``left_out`` changed and is not kept."""

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    lost: float = 0.0
    total: float = 0.0

    @property
    def relative_error(self) -> float:
        """Over all modules that have a pair."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0

    @property
    def rank(self) -> int:
        return max((a.shape[0] for a, _ in self.pairs.values()), default=0)

    @property
    def saved_modules(self) -> list[str]:
        return sorted({name.rpartition(".")[0] for name in self.saved})


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
    if not found.pairs:
        raise Incompatible(
            "no linear layer differs between the two models"
            + (f" (but {', '.join(found.left_out[:3])})" if found.left_out else ""),
            hint="give a model whose linear layers were trained",
        )
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
        pair, lost, total = best_pair(delta.T if type_ == "Conv1D" else delta, wanted)
        if not total:
            return
        found.pairs[module] = pair
        found.errors[module] = math.sqrt(lost / total)
        found.lost, found.total = found.lost + lost, found.total + total
    elif (type_ is None and kind in ("weight", "bias")) or (kind == "weight" and module in untied):  # a norm, a table
        found.saved[name] = new.contiguous()
    else:
        found.left_out.append(name)


def best_pair(delta: Tensor, wanted: Wanted) -> tuple[tuple[Tensor, Tensor], float, float]:
    """A (r, in) and B (out, r) in float32 with B @ A near ``delta`` (out, in); ‖delta - B A‖² and ‖delta‖²."""
    total = float(delta.double().square().sum())
    smaller = min(delta.shape)
    size = min(wanted.rank or 16, smaller)
    while True:
        u, sigma, vh = _decompose(delta, size)
        rank = min(size, len(sigma))
        if wanted.rank is None:
            left = total - sigma.square().cumsum(0)
            enough = (left <= wanted.tolerance**2 * total).nonzero()
            if not len(enough) and size < smaller:
                size = min(4 * size, smaller)
                continue
            rank = int(enough[0]) + 1 if len(enough) else len(sigma)
        root = sigma[:rank].sqrt()
        pair = (root[:, None] * vh[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous()
        lost = float((delta - pair[1] @ pair[0]).double().square().sum())
        return pair, lost, total


def _decompose(delta: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix with their vectors, at least ``size`` of them, in float64."""
    smaller = min(delta.shape)
    columns = size + _OVERSAMPLING
    if smaller <= _SMALL or 2 * columns >= smaller:
        u, sigma, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        return u, sigma, vh
    random = torch.randn(delta.shape[1], columns, generator=torch.Generator().manual_seed(0))
    q = torch.linalg.qr(delta @ random).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    u, sigma, vh = torch.linalg.svd((q.T @ delta).double(), full_matrices=False)
    return q.double() @ u, sigma, vh


def write_extraction(found: Extraction, base: Base, folder: Path) -> None:
    """Write a PEFT checkpoint: alpha = rank on every module, so that nothing is scaled."""
    tensors = {f"{_PREFIX}{name}": tensor for name, tensor in found.saved.items()}
    for module, (a, b) in found.pairs.items():
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    config = {
        **plain_lora_config({module: a.shape[0] for module, (a, _) in found.pairs.items()}, {}),
        "base_model_name_or_path": base.hub_id or base.source,
        "inference_mode": True,
        "modules_to_save": found.saved_modules or None,
    }
    atomic.write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
