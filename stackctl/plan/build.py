"""Entries and headers to a :class:`stackctl.plan.stack_plan.StackPlan`, with *all* problems at once. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stackctl.core.schema import Base, MethodOptions, ModuleShape
from stackctl.lora.naming import ExpertFactors, Naming, Place, naming_of, on_base
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.lora.target_modules import expand_modules, lora_rank, lora_scaling, natural_order
from stackctl.lora.target_parameters import EXPERTS, Pairs, pattern_name, place_pairs
from stackctl.plan.layer_weights import Weights
from stackctl.plan.methods import SUM
from stackctl.plan.refusals import no_plain_lora, refusals
from stackctl.plan.stack_plan import Factor, ModulePlan, PlanMember, Problem, Replacement, StackPlan, TokenRows
from stackctl.plan.token_rows import clashing_rows, member_rows, rows_without_sum
from stackctl.plan.validate import (
    clashing_replacements,
    missing_foundations,
    other_rows,
    recorded_problems,
    same_adapter_twice,
    saved_with_changes,
    unfitting_layer_weights,
    unfitting_tensors,
    unlike_bases,
    unread_tensors,
)


def plan_stack(
    base: Base | None, members: Sequence[PlanMember], method: str = SUM, options: MethodOptions | None = None
) -> StackPlan:
    """Plan ``members`` on ``base`` (None: a checkpoint by itself, shapes unchecked), composed by a method."""
    parts = _Parts(base, expand_modules(base.modules) if base else None)
    parts.problems += [*same_adapter_twice(members), *unlike_bases(base, members)]
    planned = [parts.add(index, member) for index, member in enumerate(members)]
    parts.problems += list(parts.clashes(planned, method))
    return StackPlan(
        base, tuple(planned), parts.modules(), tuple(parts.replacements), tuple(parts.rows), tuple(parts.problems),
        method, options or MethodOptions(),
    )  # fmt: skip


@dataclass
class _Parts:
    """What members bring, one after another, and what is wrong with it. ``known`` are the modules of the base."""

    base: Base | None
    known: dict[str, ModuleShape] | None
    factors: dict[str, list[Factor]] = field(default_factory=dict)
    shapes: dict[str, ModuleShape] = field(default_factory=dict)
    replacements: list[Replacement] = field(default_factory=list)
    rows: list[TokenRows] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, index: int, member: PlanMember) -> PlanMember:
        """Take up what a member brings. Returns the member, whose checkpoint knows its base then."""
        self.problems += recorded_problems(member.label, member.recorded)
        if other := no_plain_lora(member):
            self.problems += other
            return member
        base, known, checkpoint = self.base, self.known, member.checkpoint
        naming = Naming(known or {}, {}) if known is None or base is None else naming_of(checkpoint, base, known)
        member = replace(member, checkpoint=on_base(checkpoint, base, naming))
        self.problems += refusals(member, base)
        theirs = None if known is None else naming.known
        pairs = place_pairs(member.checkpoint.pairs, checkpoint.config, theirs)
        self.problems += unfitting_tensors(member, pairs, theirs, base)
        if base is not None:
            self.problems += other_rows(member, naming, base)
            self.problems += unread_tensors(member, pairs, naming, base)
        self._add_factors(index, member, naming, pairs)
        rows, wrong_rows = member_rows(index, member, naming, base)
        self.rows += rows
        self.problems += wrong_rows
        if known is not None:
            self.problems += unfitting_layer_weights(member, known, [*self.shapes, *(row.module for row in rows)])
        self.replacements += _replacements(index, member, naming, base)
        return member

    def _add_factors(self, index: int, member: PlanMember, naming: Naming, pairs: Pairs) -> None:
        known, config = self.known, member.checkpoint.config
        apart, weights = _SingleExperts(index, config), Weights.of(member.weight, member.layer_weights)
        for module, pair in pairs.items():
            shape = naming.known.get(module) if known is not None else _shape_from(pair, config, module)
            if shape is None or set(pair) != {"A", "B"}:
                continue
            place = naming.place(module)
            self.shapes[place.module] = known[place.module] if known is not None else shape
            if place.expert is not None:
                apart.add(place, module, pair)
            elif (weight := weights.at(place.module)) != 0:
                scaling = lora_scaling(config, pattern_name(config, module, shape))
                rank = (pair["A"].shape[0] if pair["A"].shape else 0) // _experts(shape)
                factor = Factor(index, pair["A"], pair["B"], rank, scaling, weight)
                self.factors.setdefault(place.module, []).append(factor)
        for module, joined in apart.factors(self.shapes).items():
            if joined is not None and (weight := weights.at(module)) != 0:
                self.factors.setdefault(module, []).append(replace(joined, weight=weight))
        self.problems += apart.problems(member)

    def clashes(self, members: Sequence[PlanMember], method: str) -> Iterator[Problem]:
        """What is wrong with all of it together."""
        yield from clashing_replacements(self.replacements, members)
        standing = {name: [factor.member for factor in found] for name, found in self.factors.items()}
        yield from saved_with_changes(self.replacements, members, standing)
        yield from clashing_rows(self.rows, members, standing, self.replacements)
        if self.rows and method != SUM:
            yield rows_without_sum(members[self.rows[0].member].label, method)
        yield from missing_foundations(members)

    def modules(self) -> dict[str, ModulePlan]:
        """Module by module, in natural order; what does not have the shape of its kind is among the problems."""
        return {
            name: ModulePlan(name, shape.type, (shape.shape[-2], shape.shape[-1]), tuple(found), _experts(shape))
            for name, found in sorted(self.factors.items(), key=lambda item: natural_order(item[0]))
            if len((shape := self.shapes[name]).shape) == (3 if shape.type in EXPERTS else 2)
        }


class _SingleExperts:
    """A member's factors of single experts, put together to those of the parameters that hold the experts now."""

    def __init__(self, index: int, config: dict[str, Any]) -> None:
        self._index, self._config = index, config
        self._found: dict[str, dict[tuple[int, int], dict[str, TensorInfo]]] = {}
        self._scaling: dict[str, set[float]] = {}
        self._odd: list[str] = []

    def add(self, place: Place, module: str, pair: dict[str, TensorInfo]) -> None:
        assert place.expert is not None
        self._found.setdefault(place.module, {})[place.part, place.expert] = pair
        self._scaling.setdefault(place.module, set()).add(lora_scaling(self._config, module))

    def factors(self, shapes: dict[str, ModuleShape]) -> dict[str, Factor | None]:
        """One factor for each parameter; None where there is no single one."""
        made: dict[str, Factor | None] = {}
        for module, found in self._found.items():
            experts, parts = shapes[module].shape[0], 1 + max(part for part, _ in found)
            parts = max(parts, round(shapes[module].shape[1] / next(iter(found.values()))["B"].shape[0]))
            places = [(part, expert) for part in range(parts) for expert in range(experts)]
            alike = {(pair["A"].shape, pair["B"].shape) for pair in found.values()}
            if set(places) != set(found) or len(alike) > 1 or len(self._scaling[module]) > 1:
                self._odd.append(module)
                made[module] = None
                continue
            a, b = (
                ExpertFactors(
                    role, tuple(tuple(found[part, expert][role] for expert in range(experts)) for part in range(parts))
                )
                for role in ("A", "B")
            )
            rank = next(iter(found.values()))["A"].shape[0] * parts
            made[module] = Factor(self._index, a, b, rank, next(iter(self._scaling[module])), 1.0)
        return made

    def problems(self, member: PlanMember) -> Iterator[Problem]:
        if self._odd:
            what = f"{member.label}: it adapts some experts and not all alike, which are one parameter: {self._odd[0]}"
            hint = "train it again on every expert, with one rank and alpha"
            yield Problem("single_experts", what, hint, member.label)


def _experts(shape: ModuleShape) -> int:
    return max(shape.shape[0], 1) if shape.type in EXPERTS and len(shape.shape) == 3 else 1


def _shape_from(pair: dict[str, TensorInfo], config: dict[str, Any], module: str) -> ModuleShape | None:
    """A module's shape by its factors alone, when no base is at hand."""
    if set(pair) != {"A", "B"} or len(pair["A"].shape) != 2 or len(pair["B"].shape) != 2:
        return None
    rows, rank = pair["A"].shape[0], lora_rank(config, module)
    if config.get("target_parameters") and rows != rank and rows % rank == 0:  # all experts' ranks in one tensor
        return ModuleShape(type="Experts", shape=[rows // rank, pair["B"].shape[0], pair["A"].shape[1]])
    if "lora_embedding" in pair["A"].name:
        return ModuleShape(type="Embedding", shape=[pair["A"].shape[1], pair["B"].shape[0]])
    return ModuleShape(type="Linear", shape=[pair["B"].shape[0], pair["A"].shape[1]])


def _replacements(index: int, member: PlanMember, naming: Naming, base: Base | None) -> list[Replacement]:
    checkpoint = member.checkpoint
    wanted = {"saved"}
    if checkpoint.config.get("bias", "none") != "none":
        wanted.add("bias")
    if member.weight == 0:
        return []
    found, untold = dict[str, TensorInfo](), dict[str, TensorInfo]()
    for name, tensor in checkpoint.tensors.items():
        slot = checkpoint.slots[name]
        if slot.role in wanted:
            parameter = naming.parameter(f"{slot.module}.{name.rpartition('.')[2]}")
            found[parameter] = tensor
            if slot.role == "saved" and not checkpoint.is_told_to_save(slot.module):
                untold[parameter] = tensor
    if base is not None and base.tied_embeddings:  # PEFT loads what is saved untold into the one weight that both have
        ends = [f"{base.input_embedding}.weight", f"{base.output_embedding}.weight"]
        found = {end: untold[one] for one, end in (ends, ends[::-1]) if one in untold} | found
    return [Replacement(index, parameter, tensor) for parameter, tensor in found.items()]
