"""Entries and headers to a :class:`StackPlan`, with *all* problems at once. Pure: no disk, no tensors.

A plan is the whole truth about a stack before anything is loaded: for every module which members stand on it, with
which factors, ranks and scalings. Fold, export, inspect and every refusal are made from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from stackctl.checkpoint import DTYPE_NAMES, Checkpoint, TensorInfo
from stackctl.errors import Incompatible, VerificationFailed
from stackctl.methods import METHODS, SUM
from stackctl.modules import expand_modules, expected_targets, lora_rank, lora_scaling
from stackctl.names import format_term
from stackctl.schema import Base, MethodOptions, ModuleShape


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


@dataclass(frozen=True)
class PlanMember:
    """One adapter version with its weight. ``label`` is ``style@1``; ``trained_on`` its own members, by label."""

    label: str
    weight: float
    checkpoint: Checkpoint
    adapter: str = ""
    version: int = 0
    digest: str = ""
    base: str = ""
    fingerprint: str = ""
    trained_on: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank on any module."""
        shapes = [pair["A"].shape for pair in self.checkpoint.pairs.values() if "A" in pair]
        return max((shape[0] for shape in shapes if shape), default=0)


@dataclass(frozen=True, slots=True)
class Factor:
    """A member's share of one module: ΔW = weight · scaling · B @ A, with A (rank, in) and B (out, rank)."""

    member: int
    a: TensorInfo
    b: TensorInfo
    rank: int
    scaling: float


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """All that stands on one module. ``shape`` is the delta's: (out, in), of an Embedding (vocabulary, dimension)."""

    name: str
    type: str
    shape: tuple[int, int]
    factors: tuple[Factor, ...]

    @property
    def rank(self) -> int:
        return sum(factor.rank for factor in self.factors)


@dataclass(frozen=True, slots=True)
class Replacement:
    """A parameter that a member brings whole (``modules_to_save``, trained biases)."""

    member: int
    parameter: str
    tensor: TensorInfo


@dataclass(frozen=True)
class StackPlan:
    """What a stack is, module by module. Members of weight zero are listed and contribute nothing."""

    base: Base | None
    members: tuple[PlanMember, ...]
    modules: dict[str, ModulePlan]
    replacements: tuple[Replacement, ...] = ()
    problems: tuple[Problem, ...] = field(default=())
    method: str = SUM
    options: MethodOptions = field(default_factory=MethodOptions)

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

    @cached_property
    def expression(self) -> str:
        return "+".join(format_term(m.label, m.weight) for m in self.members) or "base"

    def check(self) -> StackPlan:
        """This plan, if nothing stands in its way.

        Raises:
            Incompatible, VerificationFailed: with every problem in one message.
        """
        if not self.errors:
            return self
        damaged = all(p.code == "damaged" for p in self.errors)
        kind = VerificationFailed if damaged else Incompatible
        raise kind(
            "; ".join(p.message for p in self.errors),
            hint="; ".join(dict.fromkeys(p.hint for p in self.errors if p.hint)) or None,
        )


_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Keys of LoraConfig that change nothing about what B and A mean once they are trained.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "alpha_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora", "velora_config",
}  # fmt: skip

NEWEST_PEFT = "0.21"
"""Whose options of a LoRA were all looked at; a newer one may have more."""

_REFUSED = {
    "use_dora": "is DoRA, whose effect is not a sum of deltas",
    "trainable_token_indices": "trains single token embeddings (trainable_token_indices)",
    "target_parameters": "adapts parameters instead of modules (target_parameters)",
    "lora_bias": "has a bias in its B factor (lora_bias)",
    "layer_replication": "replicates layers of the base (layer_replication)",
    "alora_invocation_tokens": "is an activated LoRA, on only after its invocation tokens",
    "use_qalora": "is a QA-LoRA, whose factors have other shapes",
    "use_bdlora": "is a block-diagonal LoRA",
    "arrow_config": "routes between adapters (arrow_config)",
    "kasa_config": "is a KaSA adapter, whose effect is not a sum of deltas",
    "monteclora_config": "is a MonteCLoRA adapter, whose effect is not a sum of deltas",
}


def plan_stack(
    base: Base | None, members: Sequence[PlanMember], method: str = SUM, options: MethodOptions | None = None
) -> StackPlan:
    """Plan ``members`` on ``base`` (None: a checkpoint by itself, shapes unchecked), composed by a method."""
    known = expand_modules(base.modules) if base else None
    problems: list[Problem] = [*_same_adapter_twice(members), *_unlike_bases(base, members)]
    factors: dict[str, list[Factor]] = {}
    shapes: dict[str, ModuleShape] = {}
    replacements: list[Replacement] = []
    for index, member in enumerate(members):
        refused = _refusals(member)
        problems += refused
        if not member.checkpoint.is_lora:
            continue
        problems += _check_tensors(member, known, base)
        for module, pair in member.checkpoint.pairs.items():
            shape = known.get(module) if known is not None else _shape_from(pair, member, module)
            if shape is None or set(pair) != {"A", "B"}:
                continue
            shapes[module] = shape
            if member.weight != 0:
                scaling = lora_scaling(member.checkpoint.config, module)
                rank = pair["A"].shape[0] if pair["A"].shape else 0
                factors.setdefault(module, []).append(Factor(index, pair["A"], pair["B"], rank, scaling))
        replacements += _replacements(index, member)
    problems += _clashing_replacements(replacements, members)
    problems += _missing_foundations(members)
    modules = {
        name: ModulePlan(name, shapes[name].type, (shapes[name].shape[0], shapes[name].shape[1]), tuple(found))
        for name, found in sorted(factors.items(), key=lambda item: _natural(item[0]))
        if len(shapes[name].shape) == 2
    }
    return StackPlan(
        base, tuple(members), modules, tuple(replacements), tuple(problems), method, options or MethodOptions()
    )


def _natural(name: str) -> list[tuple[bool, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(not part.isdigit(), part.zfill(20) if part.isdigit() else part) for part in name.split(".")]


def _same_adapter_twice(members: Sequence[PlanMember]) -> list[Problem]:
    problems, seen = [], dict[str, str]()
    for member in members:
        key = member.adapter or member.label
        if key in seen:
            problems.append(
                Problem(
                    "same_adapter_twice",
                    f"the adapter '{key}' stands in the stack twice ({seen[key]} and {member.label})",
                    "name it once, with the weight it shall have",
                    member.label,
                )
            )
        seen.setdefault(key, member.label)
    return problems


def _unlike_bases(base: Base | None, members: Sequence[PlanMember]) -> list[Problem]:
    bases = {member.base for member in members if member.base}
    if len(bases) > 1:
        which = ", ".join(f"{m.label} on {m.base}" for m in members)
        return [Problem("unlike_bases", f"the members stand on different bases: {which}", "use adapters of one base")]
    return [
        Problem(
            "other_base",
            f"{member.label} was trained on another model than the base '{base.name}' now is (fingerprints differ)",
            f"register that model under another name, or train {member.adapter} again",
            member.label,
        )
        for member in members
        if base and member.fingerprint and member.fingerprint != base.fingerprint
    ]


def _refusals(member: PlanMember) -> list[Problem]:
    """What cannot be summed, by the configuration alone."""
    config, label = member.checkpoint.config, member.label
    if not member.checkpoint.is_lora:
        what = f"{label} is of PEFT type {config.get('peft_type')}, not LORA"
        return [Problem("not_lora", what, "only LoRA adapters can be stacked", label)]
    problems = [
        Problem(key, f"{label} {why}", f"train {member.adapter or label} again as a plain LoRA", label)
        for key, why in _REFUSED.items()
        if config.get(key)
    ]
    if config.get("ensure_weight_tying") and (config.get("modules_to_save") or _stands_on_embedding(member)):
        problems.append(
            Problem(
                "ensure_weight_tying",
                f"{label} trains the embedding and the head as one (ensure_weight_tying)",
                f"train {member.adapter or label} again without that option",
                label,
            )
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGED_BASE):
        problems.append(
            Problem(
                "changed_base",
                f"{label} was initialised with {init}, which changed the base it was trained on",
                "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion",
                label,
            )
        )
    if config.get("bias", "none") != "none" and member.weight not in (0, 1):
        problems.append(_not_weighable(label, f"trained biases (bias={config['bias']})"))
    if config.get("modules_to_save") and member.weight not in (0, 1):
        problems.append(_not_weighable(label, "whole modules (modules_to_save)"))
    problems += [
        Problem(
            "unknown_key",
            f"{label} was saved by PEFT {str(config.get('peft_version', '?'))[:20]} with '{key[:60]}', which is not "
            f"known here: the options of PEFT up to {NEWEST_PEFT} are",
            "pip install --upgrade stackctl-lora, or train it without that option",
            label,
        )
        for key, value in config.items()
        if key not in _HARMLESS and key not in _REFUSED and value not in (None, False, [], {}, "")
    ]
    return problems


def _stands_on_embedding(member: PlanMember) -> bool:
    return any("lora_embedding" in name for name in member.checkpoint.tensors)


def _not_weighable(label: str, what: str) -> Problem:
    return Problem(
        "not_weighable", f"{label} carries {what}, which have no weight", f"use {label} with weight 1", label
    )


def _shape_from(pair: dict[str, TensorInfo], member: PlanMember, module: str) -> ModuleShape | None:
    """A module's shape by its factors alone, when no base is at hand."""
    if set(pair) != {"A", "B"} or len(pair["A"].shape) != 2 or len(pair["B"].shape) != 2:
        return None
    if "lora_embedding" in pair["A"].name:
        return ModuleShape(type="Embedding", shape=[pair["A"].shape[1], pair["B"].shape[0]])
    return ModuleShape(type="Linear", shape=[pair["B"].shape[0], pair["A"].shape[1]])


def _check_tensors(member: PlanMember, known: dict[str, ModuleShape] | None, base: Base | None) -> list[Problem]:
    """Missing, extra and misshapen tensors of one member."""
    label, checkpoint, problems = member.label, member.checkpoint, list[Problem]()

    def add(code: str, names: list[str], what: str, hint: str) -> None:
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            problems.append(Problem(code, f"{label}: {what}: {shown}", hint, label))

    pairs = checkpoint.pairs
    again = "register the checkpoint again from where it was made"
    if not pairs and not checkpoint.config.get("target_parameters"):
        problems.append(Problem("no_tensors", f"{label} holds no LoRA tensors", again, label))
    add(
        "missing_tensors",
        [m for m, pair in pairs.items() if set(pair) != {"A", "B"}],
        "one factor is missing of",
        again,
    )
    floats = [n for n, t in checkpoint.tensors.items() if t.dtype not in DTYPE_NAMES]
    add("dtype", floats, "not a floating-point tensor", again)
    extra = [n for n, slot in checkpoint.slots.items() if slot.role == "unknown"]
    if checkpoint.config.get("trainable_token_indices"):
        extra = [n for n in extra if "trainable_tokens" not in n]
    if checkpoint.config.get("bias", "none") == "none":
        extra += [n for n, slot in checkpoint.slots.items() if slot.role == "bias"]
    if not checkpoint.config.get("use_dora"):
        extra += [n for n, slot in checkpoint.slots.items() if slot.role == "magnitude"]
    if not checkpoint.config.get("lora_bias"):
        extra += [n for n, slot in checkpoint.slots.items() if slot.role == "lora_bias"]
    add("extra_tensors", extra, "tensors that its configuration does not explain", again)
    wrong_rank, wrong_shape = _misshapen(member, known)
    add("rank", wrong_rank, "the rank in its tensors is not the one in its configuration", again)
    if known is None or base is None:
        add("shape", wrong_shape, "factors that do not fit each other", again)
        return problems
    fits = f"use it on the base it was trained on, not on {base.name}"
    add("shape", wrong_shape, f"tensors that do not fit {base.name}", fits)
    add("unknown_modules", [m for m in pairs if m not in known], f"modules that {base.name} does not have", fits)
    expected = expected_targets(checkpoint.config, known, base.output_embedding)
    if expected is not None:
        found = {m for m in pairs if m in known}
        add("missing_tensors", sorted(expected - found, key=_natural), "tensors are missing for", again)
        add(
            "extra_tensors",
            sorted(found - expected, key=_natural),
            "tensors for modules that it does not target",
            again,
        )
    return problems


def _misshapen(member: PlanMember, known: dict[str, ModuleShape] | None) -> tuple[list[str], list[str]]:
    wrong_rank, wrong_shape = [], []
    for module, pair in member.checkpoint.pairs.items():
        if set(pair) != {"A", "B"}:
            continue
        a, b = pair["A"].shape, pair["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
            wrong_shape.append(f"{module} (A {list(a)}, B {list(b)})")
            continue
        if a[0] != lora_rank(member.checkpoint.config, module):
            wrong_rank.append(f"{module} ({a[0]}, not {lora_rank(member.checkpoint.config, module)})")
        if known is None or module not in known:
            continue
        shape = known[module]
        fits = [a[1], b[0]] if shape.type == "Embedding" else [b[0], a[1]]
        is_embedding = "lora_embedding" in pair["A"].name
        if fits != shape.shape or is_embedding != (shape.type == "Embedding"):
            wrong_shape.append(f"{module} ({fits}, not {shape.shape})")
    return wrong_rank, wrong_shape


def _replacements(index: int, member: PlanMember) -> list[Replacement]:
    checkpoint = member.checkpoint
    wanted = {"saved"}
    if checkpoint.config.get("bias", "none") != "none":
        wanted.add("bias")
    if member.weight == 0:
        return []
    return [
        Replacement(index, name.removeprefix("base_model.model.").replace(".base_layer.", "."), tensor)
        for name, tensor in checkpoint.tensors.items()
        if checkpoint.slots[name].role in wanted
    ]


def _clashing_replacements(replacements: Sequence[Replacement], members: Sequence[PlanMember]) -> list[Problem]:
    """Two members that bring the same parameter, or whole modules of their own, which nothing has seen together."""
    owners: dict[str, list[str]] = {}
    savers = {r.member for r in replacements if members[r.member].checkpoint.config.get("modules_to_save")}
    for replacement in replacements:
        owners.setdefault(replacement.parameter, []).append(members[replacement.member].label)
    clashes = {parameter: labels for parameter, labels in owners.items() if len(labels) > 1}
    if not clashes and len(savers) > 1:
        clashes = {r.parameter: [members[r.member].label] for r in replacements if r.member in savers}
    if not clashes:
        return []
    labels = sorted({label for found in clashes.values() for label in found})
    names = ", ".join(sorted(clashes)[:3])
    what = f"{' and '.join(labels)} each bring their own {names} (modules_to_save or bias)"
    return [Problem("modules_to_save", what, "only one member of a stack may carry whole modules")]


def _missing_foundations(members: Sequence[PlanMember]) -> list[Problem]:
    """A warning where a member stands without what it was trained on, or on another version of it."""
    present = {m.adapter: format_term(m.label, m.weight) for m in members}
    problems = []
    for member in members:
        for needed in member.trained_on if member.weight != 0 else ():
            name = needed.partition("@")[0]
            if present.get(name) == needed:
                continue
            instead = f", here {present[name]} is" if name in present else ""
            problems.append(
                Problem(
                    "foundation",
                    f"{member.label} was trained on {needed}{instead or ', which is not in this stack'}",
                    f"for what was trained, compose {'+'.join([*member.trained_on, member.label])}",
                    member.label,
                    "warning",
                )
            )
    return problems
