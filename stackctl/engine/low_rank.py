"""The best pair of factors for a full change of a weight, and a PEFT checkpoint of such pairs.

The decomposition is the randomised one of Halko, Martinsson and Tropp (https://arxiv.org/abs/0909.4061, algorithms 4.4
and 5.1) with oversampling and power iterations, exact where the matrix is small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stackctl.lora.checkpoint import CONFIG, WEIGHTS
from stackctl.lora.lora_config import plain_lora_config
from stackctl.storage import atomic

_PREFIX = "base_model.model."
_OVERSAMPLING, _ITERATIONS = 16, 4
_SMALL = 512
"""The smaller side up to which a matrix is decomposed exactly."""
_OWN, _OWN_RANK = 1e-6, 256
"""What rounding leaves of a change when it has a rank of its own, and the largest that is looked for."""
_NOTHING = 1e-9
"""What is left where a change has no more directions: those are not written, whatever rank was asked for."""
_OTHERWISE = 0.01
"""The share that may be lost of a change without a rank of its own, where nothing was asked for."""


@dataclass(frozen=True)
class Wanted:
    """How much is kept of each module: a rank, or as many directions as leave ``tolerance`` of the change behind.

    With neither: all of it where its own rank makes a pair no larger than the matrix, else all but a hundredth.
    """

    rank: int | None = None
    tolerance: float | None = None


@dataclass
class Pairs:
    """A LoRA in the making. ``pairs`` are A (r, in) and B (out, r) by module; ``errors`` ‖ΔW - B A‖ / ‖ΔW‖."""

    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    saved: dict[str, Tensor] = field(default_factory=dict)
    saved_modules: list[str] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    lost: float = 0.0
    total: float = 0.0

    def keep(self, module: str, delta: Tensor, wanted: Wanted) -> None:
        """Keep the best pair for a module's change (out, in); a change of nothing is none."""
        total = float(delta.double().square().sum())
        if total:
            self.put(module, best_pair(delta, wanted), delta)

    def put(self, module: str, pair: tuple[Tensor, Tensor], delta: Tensor) -> None:
        """Keep a pair for a module, and how far its product is from the module's change (out, in)."""
        a, b = pair
        lost = float((delta.double() - b.double() @ a.double()).square().sum())
        total = float(delta.double().square().sum())
        self.pairs[module] = pair
        self.errors[module] = math.sqrt(lost / total)
        self.lost, self.total = self.lost + lost, self.total + total

    @property
    def relative_error(self) -> float:
        """Over all modules that have a pair."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0

    @property
    def rank(self) -> int:
        return max((a.shape[0] for a, _ in self.pairs.values()), default=0)

    def write(self, folder: Path, base_name: str, settings: Mapping[str, Any]) -> None:
        """Write a PEFT checkpoint: alpha = rank on every module, so that nothing is scaled."""
        tensors = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in self.saved.items()}
        tensors |= {f"{_PREFIX}{module}.base_layer.bias": bias.contiguous() for module, bias in self.biases.items()}
        for module, (a, b) in self.pairs.items():
            part, end = ("lora_embedding_", "") if module in self.embeddings else ("lora_", ".weight")
            tensors[f"{_PREFIX}{module}.{part}A{end}"] = a.contiguous()
            tensors[f"{_PREFIX}{module}.{part}B{end}"] = b.contiguous()
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = {
            **plain_lora_config({module: a.shape[0] for module, (a, _) in self.pairs.items()}, {}),
            "base_model_name_or_path": base_name,
            "inference_mode": True,
            "modules_to_save": self.saved_modules or None,
            **settings,
        }
        if self.biases:
            config["bias"] = "lora_only"
        atomic.write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def best_pair(delta: Tensor, wanted: Wanted) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in float32 with B @ A as near ``delta`` (out, in) as is wanted."""
    if wanted.rank is not None:
        decomposed = _decompose(delta, min(wanted.rank, *delta.shape))
        directions = _enough(delta, decomposed[1], _NOTHING) or wanted.rank
        return _cut(decomposed, min(wanted.rank, directions, len(decomposed[1])))
    if wanted.tolerance is not None:
        return _within(delta, wanted.tolerance)
    rows, columns = delta.shape
    affordable = min(rows * columns // (rows + columns), _OWN_RANK)
    decomposed = _decompose(delta, max(1, affordable))
    own = _enough(delta, decomposed[1], _OWN)
    return _cut(decomposed, own) if own is not None and own <= affordable else _within(delta, _OTHERWISE)


def _within(delta: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The pair of the smallest rank that loses at most ``tolerance`` of a change."""
    smaller = min(delta.shape)
    size = min(16, smaller)
    while True:
        decomposed = _decompose(delta, size)
        enough = _enough(delta, decomposed[1], tolerance)
        if enough is not None or size >= smaller:
            return _cut(decomposed, enough or len(decomposed[1]))
        size = min(4 * size, smaller)


def _enough(delta: Tensor, sigma: Tensor, tolerance: float) -> int | None:
    """How many of a change's largest singular values leave at most ``tolerance`` of it behind."""
    total = float(delta.double().square().sum())
    left = (total - sigma.square().cumsum(0)).clamp(min=0)
    if len(sigma) == min(delta.shape):  # all of them are there, and what is left is theirs: no difference of sums
        left = torch.cat([sigma.square().flip(0).cumsum(0).flip(0)[1:], sigma.new_zeros(1)])
    found = (left <= tolerance**2 * total).nonzero()
    return int(found[0]) + 1 if len(found) else None


def _cut(decomposed: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    u, sigma, vh = decomposed
    root = sigma[:rank].sqrt()
    return (root[:, None] * vh[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous()


def _decompose(delta: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix with their vectors, at least ``size`` of them, in float64."""
    smaller = min(delta.shape)
    columns = size + _OVERSAMPLING
    if smaller <= _SMALL or 2 * columns >= smaller:
        u, sigma, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        return u, sigma, vh
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(delta.shape[1], columns, generator=generator).to(delta)
    q = torch.linalg.qr(delta @ random).Q
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ q).Q).Q
    u, sigma, vh = torch.linalg.svd((q.T @ delta).double(), full_matrices=False)
    return q.double() @ u, sigma, vh
