"""What a training will need of memory, from a base's entry and the settings alone.

An estimate in bytes for one process, made before anything is loaded: what is exact (parameters, gradients, the
optimizer's state) is counted, and what depends on the architecture (activations) is taken as a Llama-like layer has
them. A test holds it against what a model really keeps for its backward pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from stackctl.core.schema import Base
from stackctl.lora.target_modules import expand_modules
from stackctl.storage.files import human_bytes

Precision = Literal["float32", "autocast", "half", "nf4"]
"""Weights and products in float32; products in bfloat16; weights of two bytes; of four bits."""

_WEIGHT = {"float32": 4.0, "autocast": 4.0, "half": 2.0, "nf4": 0.516}  # nf4: its scales are 8 bits a 64 weights
_VALUE = {"float32": 4.0, "autocast": 3.0, "half": 2.0, "nf4": 2.0}
LOSS_CHUNK = 64 * 2**20
"""Bytes of float32 logits that the loss is computed of at once (:mod:`stackctl.engine.loss.token_losses`)."""
_LOGIT = 12
"""A logit of such a chunk in float32, exponentiated, and in two bytes as the head makes it and as its gradient."""
_LIBRARIES, _ALL_LIBRARIES = 400_000_000, 600_000_000
"""Python with torch and its family: what one process imports, and what each of several that train together does
(:mod:`stackctl.engine.quick_imports`)."""
_FRAGMENTATION, _FRAGMENTATION_FUSED = 0.5, 0.25
"""By how much of what comes and goes in each step a C library's heap grows beyond it; measured with glibc. Fused
functions write over what they no longer need, and leave the heap less fragmented."""
_OPTIMIZER = 8
"""AdamW: two values of float32 for each that is trained."""
QUANTISED_FROM = 4096
"""Values of a parameter from which bitsandbytes keeps the optimizer's state of it in 8 bits."""
_BLOCK = 256
"""Values that share a scale of float32 there."""
_EXPERTS = 2
"""Experts that see a token, in a mixture whose entry does not say."""
_GATHERED = 2
"""Layers that FSDP holds whole at once: the one at work, and the next."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes in each process. ``checkpointed`` is what activations take with activation checkpointing, ``backward`` are
    the gradients of one layer's, which come and go on the way back.

    ``loading``: before FSDP shards it, each process holds the whole base once.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int
    backward: int
    logits: int
    libraries: int
    fragmentation: int
    loading: int
    processes: int
    sharded: bool
    checkpointing: bool
    available: int = 0
    shared: bool = False
    """Whether all processes take it from the same memory, as from a machine's RAM."""

    @property
    def total(self) -> int:
        """The most that is needed at once: while training, or before the base is sharded."""
        trained = self.adapter + self.gradients + self.optimizer
        return (
            max(self.base + trained + self.kept + self.backward + self.logits + self.fragmentation, self.loading)
            + self.libraries
        )

    @property
    def kept(self) -> int:
        """What activations take in this run."""
        return self.checkpointed if self.checkpointing else self.activations

    @property
    def fits(self) -> bool:
        """Whether what is ``available`` is enough."""
        return self.total * (self.processes if self.shared else 1) <= self.available

    def as_json(self) -> dict[str, int | bool]:
        told = asdict(self)
        del told["available"], told["shared"]
        return {**told, "total": self.total, "available": self.available, "fits": self.fits}

    def render(self) -> str:
        """Two lines for a person."""
        parts = {"base": self.base, "adapter and optimizer": self.adapter + self.gradients + self.optimizer}
        parts |= {
            "activations": self.kept + self.backward,
            "logits": self.logits,
            "fragmentation": self.fragmentation,
            "libraries": self.libraries,
        }
        parts = {name: size for name, size in parts.items() if size}
        each = f" in each of {self.processes} processes" if self.processes > 1 else ""
        verdict = "" if self.fits else ", which is more than there is"
        told = ", ".join(f"{name} {human_bytes(size)}" for name, size in parts.items())
        return f"memory: about {human_bytes(self.total)}{each} of {human_bytes(self.available)}{verdict}\n  {told}"


@dataclass(frozen=True)
class NewAdapter:
    """What is trained, on what: the full names of the modules that it stands on, the summed ``live_rank`` of a frozen
    stack that is kept live, and how many single tokens have their rows trained.

    While the loss of such tokens is computed, there is a copy of the head with their rows in it, and afterwards as
    large a gradient of the embedding.
    """

    rank: int
    targets: Collection[str]
    live_rank: int = 0
    token_rows: int = 0
    eight_bits: bool = False
    """The optimizer's state, by bitsandbytes."""
    dropout: bool = False
    """Each module that it stands on keeps which of its input's values are dropped, a byte for each."""


@dataclass(frozen=True)
class LargestBatch:
    """The largest micro-batch: its tokens, and those with a label.

    ``checkpointing``: activations inside a layer are computed again for the backward pass instead of kept; ``taught``:
    logits of a teacher stand beside its own. ``at_once``: in how many parts it is computed at once.
    """

    tokens: int
    supervised: int
    checkpointing: bool = False
    taught: bool = False
    at_once: int = 1


@dataclass(frozen=True)
class Surroundings:
    """How and where it is computed.

    ``sharded``: FSDP, which gives each process a part of everything that is stored. ``heap``: tensors are in main
    memory, whose heap is fragmented after some steps. ``fused``: gated MLPs are one function where they can be, which
    keeps what gate and up give and nothing behind that.
    """

    precision: Precision
    processes: int = 1
    sharded: bool = False
    heap: bool = False
    fused: bool = False


@dataclass(frozen=True)
class _Shapes:
    """What a base consists of: ``modules`` with their shapes, (out, in) of the ``linear`` ones, of these the ones
    ``in_layers``; how many layers there are, and the ``hidden`` size."""

    modules: dict[str, list[int]]
    linear: dict[str, list[int]]
    in_layers: dict[str, list[int]]
    layers: int
    hidden: int
    has_conv1d: bool

    @staticmethod
    def of(base: Base) -> _Shapes:
        modules = expand_modules(base.modules)
        linear = {name: shape.shape for name, shape in modules.items() if shape.type in ("Linear", "Conv1D")}
        in_layers = {name: shape for name, shape in linear.items() if name != base.output_embedding}
        return _Shapes(
            modules={name: shape.shape for name, shape in modules.items()},
            linear=linear,
            in_layers=in_layers,
            layers=max(1, len({layer for name in in_layers if (layer := _layer(name)) is not None})),
            hidden=next((shape.shape[1] for shape in modules.values() if shape.type == "Embedding"), 0),
            has_conv1d=any(shape.type == "Conv1D" for shape in modules.values()),
        )


def estimate_memory(base: Base, adapter: NewAdapter, batch: LargestBatch, where: Surroundings) -> MemoryEstimate:
    """The memory of one training process."""
    shapes, precision, sharded = _Shapes.of(base), where.precision, where.sharded
    shards = where.processes if sharded else 1
    four_bits = _values(shapes.in_layers) if precision == "nf4" else 0
    plain = 2.0 if precision == "nf4" else _WEIGHT[precision]
    weights = int(four_bits * _WEIGHT["nf4"] + (base.parameters - four_bits) * plain)
    cast = 2 * _values(shapes.linear) if precision == "autocast" else 0  # for the backward pass
    largest = _values(shapes.in_layers) / shapes.layers * plain
    live = adapter.live_rank * sum(sum(shape) for shape in shapes.in_layers.values()) * 4
    rows = adapter.token_rows * shapes.hidden
    factors = [adapter.rank * values for name in adapter.targets for values in _factors(shapes.modules[name])]
    factors += [rows] if base.tied_embeddings or not base.output_embedding else [rows] * 2
    trained = sum(factors)

    fused = where.fused and _gated(adapter.targets) and not base.architecture.startswith("Gemma")  # its own activation
    activations = int(batch.tokens * _activations(shapes, adapter, precision, fused=fused))
    between = 4.0 if precision == "autocast" else _VALUE[precision]  # what layers hand on stays in float32
    backward = activations // shapes.layers
    checkpointed = int(batch.tokens * shapes.layers * shapes.hidden * between) + backward
    chunk = max(LOSS_CHUNK // 4, base.vocabulary_size) * batch.at_once
    logits = min(batch.supervised * base.vocabulary_size, chunk) * _LOGIT * (2 if batch.taught else 1)
    if adapter.token_rows:
        logits += int(base.vocabulary_size * shapes.hidden * (2.0 if precision == "autocast" else plain))
    comes_and_goes = (checkpointed if batch.checkpointing else activations) + backward + logits
    fragmented = (_FRAGMENTATION_FUSED if fused else _FRAGMENTATION) if where.heap else 0.0
    return MemoryEstimate(
        base=int(weights / shards + (_GATHERED * largest if sharded else 0)) + (live + cast) // shards,
        adapter=trained * 4 // shards,
        gradients=trained * 4 // shards,
        optimizer=(_state_in_eight_bits(factors) if adapter.eight_bits else trained * _OPTIMIZER) // shards,
        activations=activations,
        checkpointed=checkpointed,
        backward=backward,
        logits=logits,
        libraries=_ALL_LIBRARIES if where.processes > 1 else _LIBRARIES,
        fragmentation=int(fragmented * comes_and_goes),
        loading=weights if sharded else 0,
        processes=where.processes,
        sharded=sharded,
        checkpointing=batch.checkpointing,
    )


def _activations(shapes: _Shapes, adapter: NewAdapter, precision: Precision, *, fused: bool) -> float:
    """Bytes that all layers keep of a token for the backward pass."""
    value, targets = _VALUE[precision], adapter.targets
    experts = Counter(filter(None, map(_kind, shapes.in_layers)))
    share = {name: min(1.0, _EXPERTS / experts[kind]) if (kind := _kind(name)) else 1.0 for name in shapes.in_layers}
    wide = 0 if fused else 4 if shapes.has_conv1d else 2  # GPT-2 writes its GELU out
    kept: float = sum(out * share[name] for name, (out, _) in shapes.in_layers.items())
    kept += shapes.layers * (
        5 * shapes.hidden + wide * max((width for _, width in shapes.in_layers.values()), default=0)
    )
    inputs = sum(shapes.modules[name][-1] * share.get(name, 1.0) for name in targets)
    casts = inputs * 4 if value < 3 else 0
    low = (adapter.rank + adapter.live_rank) * len(targets) * 4
    return kept * value + casts + low + (inputs if adapter.dropout else 0)


def _values(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many values matrices have."""
    return sum(out * width for out, width in shapes.values())


def _gated(targets: Collection[str]) -> bool:
    """Whether an adapter stands on all of a gated MLP."""
    return {name.rpartition(".")[2] for name in targets} >= {"gate_proj", "up_proj", "down_proj"}


def _layer(name: str) -> str | None:
    """What tells a layer from its neighbours: the first index in a module's name."""
    return next((part for part in name.split(".") if part.isdecimal()), None)


def _kind(name: str) -> tuple[str, str] | None:
    """A mixture's place and which of an expert's modules this is; None where all tokens pass."""
    head, experts, rest = name.partition(".experts.")
    return (head, rest.partition(".")[2]) if experts else None


def _factors(shape: list[int]) -> tuple[int, int]:
    """Values of A and of B for each rank: of experts, of all of them."""
    *experts, out, width = shape
    count = experts[0] if experts else 1
    return width * count, out * count


def _state_in_eight_bits(factors: Collection[int]) -> int:
    """Bytes of what AdamW of 8 bits keeps of parameters with so many values."""
    return sum(2 * (size + 4 * -(-size // _BLOCK)) if size >= QUANTISED_FROM else size * _OPTIMIZER for size in factors)
