"""What a stack is, module by module, and all that stands in its way. Pure: no disk, no tensors.

A plan is the whole truth about a stack before anything is loaded: for every module which members stand on it, with
which factors, ranks and scalings. Fold, export, inspect and every refusal are made from it.
:func:`stackctl.plan.build.plan_stack` makes one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from stackctl.core.errors import Incompatible, VerificationFailed
from stackctl.core.expressions import format_term
from stackctl.core.provenance import EntryProblem
from stackctl.core.schema import Base, MethodOptions
from stackctl.lora.checkpoint import Checkpoint
from stackctl.lora.naming import ExpertFactors
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.lora.target_modules import lora_rank
from stackctl.lora.target_parameters import EXPERTS, is_parameter_only
from stackctl.plan.methods import METHODS, SUM


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that stands in the way (``error``), or that a person should know (``warning``)."""

    code: str
    message: str
    hint: str = ""
    member: str | None = None
    severity: Literal["error", "warning"] = "error"

    def json(self) -> dict[str, Any]:
        return {
            "code": self.code, "severity": self.severity, "member": self.member,
            "message": self.message, "hint": self.hint,
        }  # fmt: skip


def refuse(problems: Sequence[Problem]) -> None:
    """Raise what stands in the way, all of it in one message; nothing when nothing does.

    Raises:
        Incompatible, VerificationFailed: there is something; the latter where all of it is damage.
    """
    if problems:
        kind = VerificationFailed if all(p.code == "damaged" for p in problems) else Incompatible
        hints = dict.fromkeys(p.hint for p in problems if p.hint)
        raise kind("; ".join(p.message for p in problems), hint="; ".join(hints) or None)


@dataclass(frozen=True)
class PlanMember:
    """One adapter version with its weight. ``label`` is ``style@1``; ``trained_on`` its own members, by label.

    ``layer_weights`` are as in the entry of a stack: see :mod:`stackctl.plan.layer_weights`; ``recorded`` is what its
    own entry warns of, ``data`` where it was trained from.
    """

    label: str
    weight: float
    checkpoint: Checkpoint
    adapter: str = ""
    version: int = 0
    digest: str = ""
    base: str = ""
    fingerprint: str = ""
    trained_on: tuple[str, ...] = ()
    layer_weights: Mapping[str, float] = field(default_factory=dict)
    recorded: Sequence[EntryProblem] = ()
    data: str = ""

    @property
    def is_used(self) -> bool:
        """Whether it has a weight other than zero anywhere."""
        return self.weight != 0 or any(self.layer_weights.values())

    @property
    def rank(self) -> int:
        """The largest rank on any module."""
        config, pairs = self.checkpoint.config, self.checkpoint.pairs
        if config.get("target_parameters"):  # whose tensors hold the ranks of all experts together
            return max((lora_rank(config, module) for module in pairs), default=0)
        shapes = [pair["A"].shape for pair in pairs.values() if "A" in pair]
        return max((shape[0] for shape in shapes if shape), default=0)


@dataclass(frozen=True, slots=True)
class Factor:
    """A member's share of one module: ΔW = weight · scaling · B @ A, with A (rank, in) and B (out, rank).

    ``weight`` is the member's on that module, which is its one weight unless it has others by layer. Of experts, ``a``
    and ``b`` hold the factors of all of them, and ``rank`` is that of each.
    """

    member: int
    a: TensorInfo | ExpertFactors
    b: TensorInfo | ExpertFactors
    rank: int
    scaling: float
    weight: float


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """All that stands on one module. ``shape`` is the delta's: (out, in), of an Embedding (vocabulary, dimension).

    A parameter of experts is one module, with ``experts`` deltas of that shape.
    """

    name: str
    type: str
    shape: tuple[int, int]
    factors: tuple[Factor, ...]
    experts: int = 1

    @property
    def is_experts(self) -> bool:
        return self.type in EXPERTS

    @property
    def parameter(self) -> str:
        """The full name of the parameter that the delta is added to."""
        return self.name if self.is_experts else f"{self.name}.weight"

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored the other way round than the product of the factors, B @ A."""
        return self.type in ("Conv1D", "Embedding", "TransposedExperts")

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        matrix = self.shape[::-1] if self.type in ("Conv1D", "TransposedExperts") else self.shape
        return (self.experts, *matrix) if self.is_experts else matrix

    @property
    def rank(self) -> int:
        return sum(factor.rank for factor in self.factors)


@dataclass(frozen=True, slots=True)
class Replacement:
    """A parameter that a member brings whole (``modules_to_save``, trained biases)."""

    member: int
    parameter: str
    tensor: TensorInfo

    def is_bias(self, members: Sequence[PlanMember]) -> bool:
        """Whether it is a bias that was trained beside the LoRA, not one that belongs to a module saved whole."""
        module, _, kind = self.parameter.rpartition(".")
        saved = members[self.member].checkpoint.config.get("modules_to_save") or ()
        return kind == "bias" and not any(f".{name}." in f".{module}." for name in saved)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of single tokens in an embedding or a head: ``tensor`` (tokens, width) holds values, not changes.

    ΔW of a token's row is weight · (value - the base's own row).
    """

    member: int
    module: str
    tokens: tuple[int, ...]
    tensor: TensorInfo
    weight: float

    @property
    def parameter(self) -> str:
        return f"{self.module}.weight"


@dataclass(frozen=True)
class StackPlan:
    """What a stack is, module by module. Members of weight zero are listed and contribute nothing."""

    base: Base | None
    members: tuple[PlanMember, ...]
    modules: dict[str, ModulePlan]
    replacements: tuple[Replacement, ...] = ()
    token_rows: tuple[TokenRows, ...] = ()
    problems: tuple[Problem, ...] = field(default=())
    method: str = SUM
    options: MethodOptions = field(default_factory=MethodOptions)

    @property
    def folders(self) -> list[tuple[str, Path]]:
        """Its members' checkpoints by their labels."""
        return [(member.label, member.checkpoint.path) for member in self.members]

    @property
    def known_base(self) -> Base:
        """The base of a stack that stands on one, as every stack does; a checkpoint by itself may not."""
        assert self.base is not None, "only a checkpoint by itself is planned without a base"
        return self.base

    @property
    def trained_biases(self) -> list[Replacement]:
        return [one for one in self.replacements if one.is_bias(self.members)]

    @property
    def whole_modules(self) -> list[Replacement]:
        return [one for one in self.replacements if not one.is_bias(self.members)]

    @property
    def brought(self) -> str:
        """Who brings parameters of its own (``replacements``, of which there are some), and which, in words."""
        whole = self.whole_modules
        kind, first = ("whole modules", whole[0]) if whole else ("trained biases", self.replacements[0])
        return f"{self.members[first.member].label} carries {kind}"

    @property
    def errors(self) -> tuple[Problem, ...]:
        return tuple(p for p in self.problems if p.severity == "error")

    @property
    def rank(self) -> int:
        """The largest rank that the stack has on any module."""
        return max((self.rank_of(module) for module in self.modules.values()), default=0)

    def rank_of(self, module: ModulePlan) -> int:
        """The rank of the pair that is written for a module (with ``svd --rank auto``: at most that)."""
        if self.method == SUM:
            return module.rank
        wanted = self.options.rank if isinstance(self.options.rank, int) else module.rank
        own = module.rank if METHODS[self.method].low_rank else min(module.shape)
        return min(wanted, own, *module.shape)

    def peft_names(self, ranks: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """Ranks by what PEFT calls the modules: those that it adapts as modules, and those it adapts as parameters."""
        converted = self.base.converted_names if self.base else []
        modules, parameters = dict[str, int](), dict[str, int]()
        for name, module in self.modules.items():
            if is_parameter_only(name, module.type, converted):
                parameters[module.parameter] = ranks[name]
            else:
                modules[name] = ranks[name]
        return modules, parameters

    @cached_property
    def expression(self) -> str:
        return "+".join(format_term(m.label, m.weight) for m in self.members) or "base"

    def check(self) -> StackPlan:
        """This plan, if nothing stands in its way.

        Raises:
            Incompatible, VerificationFailed: with every problem in one message.
        """
        refuse(self.errors)
        return self
