"""The best pair of factors for a full change of a weight, and a PEFT checkpoint of such pairs.

The decomposition is the randomised one of Halko, Martinsson and Tropp (https://arxiv.org/abs/0909.4061, algorithms 4.4
and 5.1) with oversampling and power iterations, exact where the matrix is small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from stackctl.core.errors import Incompatible
from stackctl.core.schema import Base
from stackctl.engine import algebra
from stackctl.lora.checkpoint import CONFIG, WEIGHTS
from stackctl.lora.lora_config import PEFT_PREFIX, factor_names, plain_lora_config
from stackctl.lora.target_modules import expand_modules
from stackctl.lora.target_parameters import EXPERTS, is_parameter_only, parameter_of, wrapped_names
from stackctl.plan.stack_plan import StackPlan
from stackctl.storage import atomic

_OVERSAMPLING, _ITERATIONS = 16, 4
_SMALL = 512
"""The smaller side up to which a matrix is decomposed exactly."""
_OWN, MOST_DIRECTIONS = 1e-6, 256
"""What rounding leaves of a change when it has a rank of its own, and the largest that is looked for."""
_NOTHING = 1e-9
"""What is left where a change has no more directions: those are not written, whatever rank was asked for."""
_OTHERWISE = 0.01
"""The share that may be lost of a change without a rank of its own, where nothing was asked for."""
_WHOLE = 1e-5
"""The share up to which nothing but rounding is lost of a table that is to be kept whole."""
_ROWS = 4096
"""Rows that are looked at together in float64, of which a table of a large vocabulary has no second copy."""


@dataclass(frozen=True)
class Truncation:
    """How much is kept of each module: a rank, or as many directions as leave ``tolerance`` of the change behind.

    With neither: all of it where its own rank makes a pair no larger than the matrix, else all but a hundredth.
    """

    rank: int | None = None
    tolerance: float | None = None


@dataclass
class LowRankPairs:
    """A LoRA in the making. ``pairs`` are A (r, in) and B (out, r) by module; ``errors`` ‖ΔW - B A‖ / ‖ΔW‖.

    The pair of a parameter of experts holds the factors of all of them, as PEFT's does; ``experts`` says how many.
    """

    wanted: Truncation = Truncation()
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    saved_modules: list[str] = field(default_factory=list)
    biases: dict[str, Tensor] = field(default_factory=dict)
    lost: float = 0.0
    total: float = 0.0

    def keep(self, module: str, delta: Tensor) -> None:
        """Keep the best pair for a module's change (out, in), or (experts, out, in); a change of nothing is none."""
        if not bool(delta.any()):
            return
        if delta.ndim == 2:
            self.put(module, best_pair(delta, self.wanted), delta)
            return
        pairs = [best_pair(own, self.wanted) for own in delta]
        self.experts[module] = len(pairs)
        self.pairs[module] = algebra.join_experts(pairs)
        self._count(module, [_lost(own, pair) for own, pair in zip(delta, pairs, strict=True)])

    def put(self, module: str, pair: tuple[Tensor, Tensor], delta: Tensor) -> None:
        """Keep a pair for a module, and how far its product is from the module's change (out, in)."""
        self.pairs[module] = pair
        self._count(module, [_lost(delta, pair)])

    def put_sum(self, module: str, factors: Sequence[algebra.Factors], delta: Tensor) -> None:
        """The same for factors whose sum is the module's change: all of it is kept, or as much as is wanted."""
        rank, tolerance = self.wanted.rank, self.wanted.tolerance
        if rank is None and tolerance is None:
            self.put(module, algebra.concatenate(factors), delta)
        else:
            self.put(module, algebra.truncate(factors, rank=rank or "auto", tolerance=tolerance), delta)

    def _count(self, module: str, found: Sequence[tuple[float, float]]) -> None:
        lost, total = (math.fsum(numbers) for numbers in zip(*found, strict=True))
        self.errors[module] = math.sqrt(lost / total)
        self.lost, self.total = self.lost + lost, self.total + total

    @property
    def relative_error(self) -> float:
        """Over all modules that have a pair."""
        return math.sqrt(self.lost / self.total) if self.total else 0.0

    @property
    def rank(self) -> int:
        return max((self._rank(module) for module in self.pairs), default=0)

    def _rank(self, module: str) -> int:
        """The rank on a module; of experts that of each."""
        return self.pairs[module][0].shape[0] // self.experts.get(module, 1)

    def write(self, folder: Path, base: Base, settings: Mapping[str, Any]) -> None:
        """Write a PEFT checkpoint: alpha = rank on every module, so that nothing is scaled."""
        tensors = {f"{PEFT_PREFIX}{name}": tensor.contiguous() for name, tensor in self.saved.items()}
        for module, bias in self.biases.items():
            within = f"{module}.base_layer" if module in self.pairs else module
            tensors[f"{PEFT_PREFIX}{within}.bias"] = bias.contiguous()
        known = expand_modules(base.modules)
        wrapped = wrapped_names([module for module in self.pairs if known[module].type in EXPERTS], known)
        modules, parameters = dict[str, int](), dict[str, int]()
        for module, pair in self.pairs.items():
            kind = known[module].type
            if is_parameter_only(module, kind, base.converted_names):
                parameters[parameter_of(module, known[module])] = self._rank(module)
            else:
                modules[module] = self._rank(module)
            names = factor_names(f"{PEFT_PREFIX}{wrapped.get(module, module)}", kind)
            tensors |= {name: factor.contiguous() for name, factor in zip(names, pair, strict=True)}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = {
            **plain_lora_config(modules, parameters),
            "base_model_name_or_path": base.hub_id or base.source,
            "inference_mode": True,
            "modules_to_save": self.saved_modules or None,
            **settings,
        }
        if self.biases:
            config["bias"] = "lora_only" if self.biases.keys() <= self.pairs.keys() else "all"
        atomic.write_atomic(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def best_pair(delta: Tensor, wanted: Truncation) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) in float32 with B @ A as near ``delta`` (out, in) as is wanted."""
    if wanted.rank is not None:
        decomposed = _decompose(delta, min(wanted.rank, *delta.shape))
        directions = _enough(delta, decomposed[1], _NOTHING) or wanted.rank
        return algebra.leading_pair(*decomposed, min(wanted.rank, directions, len(decomposed[1])))
    if wanted.tolerance is not None:
        return _within(delta, wanted.tolerance)
    rows, columns = delta.shape
    affordable = min(rows * columns // (rows + columns), MOST_DIRECTIONS)
    decomposed = _decompose(delta, max(1, affordable))
    own = _enough(delta, decomposed[1], _OWN)
    if own is None or own > affordable:
        return _within(delta, _OTHERWISE)
    return algebra.leading_pair(*decomposed, own)


def whole_pair(delta: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """The pair that holds all of a change (out, in) but rounding; None where it has more than ``most`` directions."""
    most = min(most, *delta.shape)
    decomposed, enough = _decompose_within(delta, _WHOLE, most)
    return algebra.leading_pair(*decomposed, enough) if enough is not None and enough <= most else None


def _within(delta: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """The pair of the smallest rank that loses at most ``tolerance`` of a change."""
    decomposed, enough = _decompose_within(delta, tolerance, min(delta.shape))
    return algebra.leading_pair(*decomposed, enough or len(decomposed[1]))


def _decompose_within(delta: Tensor, tolerance: float, most: int) -> tuple[tuple[Tensor, Tensor, Tensor], int | None]:
    """Singular values with their vectors, more and more up to ``most`` until they hold a change within a tolerance.

    Beside them how many of them do; None where not even these do.
    """
    size = min(16, most)
    while True:
        decomposed = _decompose(delta, size)
        enough = _enough(delta, decomposed[1], tolerance)
        if enough is not None or size >= most:
            return decomposed, enough
        size = min(4 * size, most)


def _enough(delta: Tensor, sigma: Tensor, tolerance: float) -> int | None:
    """How many of a change's largest singular values leave at most ``tolerance`` of it behind."""
    total = _square(delta)
    left = (total - sigma.square().cumsum(0)).clamp(min=0)
    if len(sigma) == min(delta.shape):  # all of them are there, and what is left is theirs: no difference of sums
        left = torch.cat([sigma.square().flip(0).cumsum(0).flip(0)[1:], sigma.new_zeros(1)])
    found = (left <= tolerance**2 * total).nonzero()
    return int(found[0]) + 1 if len(found) else None


def _square(delta: Tensor) -> float:
    """‖delta‖², added up in float64."""
    return math.fsum(float(rows.double().square().sum()) for rows in delta.split(_ROWS))


def _lost(delta: Tensor, pair: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """‖delta - B A‖² and ‖delta‖²."""
    a, b = pair[0].double(), pair[1].double()
    left = zip(delta.split(_ROWS), b.split(_ROWS), strict=True)
    return math.fsum(float((rows.double() - own @ a).square().sum()) for rows, own in left), _square(delta)


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
    # In float64 from here: what is left of a change is told by a difference of sums of squares.
    q = torch.linalg.qr(q.double()).Q
    core = sum(own.T @ rows.double() for own, rows in zip(q.split(_ROWS), delta.split(_ROWS), strict=True))
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    return q @ u, sigma, vh


def export_zero(plan: StackPlan, out: Path) -> None:
    """Write a plain LoRA that adds nothing, for a program whose every row has to have an adapter.

    It is of rank 1, on the first linear layer that is not the head.

    Raises:
        Incompatible: the base has none.
    """
    base = plan.known_base
    for name, module in expand_modules(base.modules).items():
        if module.type == "Linear" and name != base.output_embedding:
            rows, columns = module.shape
            nothing = LowRankPairs(pairs={name: (torch.zeros(1, columns), torch.zeros(rows, 1))})
            with atomic.staging_directory(out.parent) as staged:
                nothing.write(staged, base, {})
                atomic.publish_directory(staged, out)
            return
    raise Incompatible(f"'{base.name}' has no linear layer")
