"""Entries and headers to a :class:`stackctl.plan.stack_plan.StackPlan`, with *all* problems at once. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from stackctl.core.schema import Base, MethodOptions, ModuleShape
from stackctl.lora.naming import ExpertFactors, Naming, Place, naming_of, on_base
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.lora.target_modules import expand_modules, lora_rank, lora_scaling, natural_order
from stackctl.lora.target_parameters import EXPERTS, pattern_name, place_pairs
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
)


def plan_stack(
    base: Base | None, members: Sequence[PlanMember], method: str = SUM, options: MethodOptions | None = None
) -> StackPlan:
    """Plan ``members`` on ``base`` (None: a checkpoint by itself, shapes unchecked), composed by a method."""
    known = expand_modules(base.modules) if base else None
    problems: list[Problem] = [*same_adapter_twice(members), *unlike_bases(base, members)]
    factors: dict[str, list[Factor]] = {}
    shapes: dict[str, ModuleShape] = {}
    replacements: list[Replacement] = []
    rows: list[TokenRows] = []
    planned = list(members)
    for index, member in enumerate(members):
        problems += recorded_problems(member.label, member.recorded)
        if other := no_plain_lora(member):
            problems += other
            continue
        config = member.checkpoint.config
        naming = Naming(known or {}, {}) if known is None or base is None else naming_of(member.checkpoint, base, known)
        member = planned[index] = replace(member, checkpoint=on_base(member.checkpoint, base, naming))
        problems += refusals(member)
        theirs = None if known is None else naming.known
        pairs = place_pairs(member.checkpoint.pairs, config, theirs)
        problems += unfitting_tensors(member, pairs, theirs, base)
        if base is not None:
            problems += other_rows(member, naming, base)
        apart, weights = _SingleExperts(index, config), Weights.of(member.weight, member.layer_weights)
        for module, pair in pairs.items():
            shape = theirs.get(module) if theirs is not None else _shape_from(pair, config, module)
            if shape is None or set(pair) != {"A", "B"}:
                continue
            place = naming.place(module)
            shapes[place.module] = known[place.module] if known is not None else shape
            if place.expert is not None:
                apart.add(place, module, pair)
            elif (weight := weights.at(place.module)) != 0:
                scaling = lora_scaling(config, pattern_name(config, module, shape))
                rank = (pair["A"].shape[0] if pair["A"].shape else 0) // _experts(shape)
                factors.setdefault(place.module, []).append(Factor(index, pair["A"], pair["B"], rank, scaling, weight))
        for module, factor in apart.factors(shapes).items():
            if factor is not None and (weight := weights.at(module)) != 0:
                factors.setdefault(module, []).append(replace(factor, weight=weight))
        problems += apart.problems(member)
        own_rows, wrong_rows = member_rows(index, member, naming, base)
        rows, problems = [*rows, *own_rows], [*problems, *wrong_rows]
        if known is not None:
            problems += unfitting_layer_weights(member, known, [*shapes, *(row.module for row in own_rows)])
        replacements += _replacements(index, member, naming, base)
    members = planned
    problems += clashing_replacements(replacements, members)
    standing = {name: [factor.member for factor in found] for name, found in factors.items()}
    problems += saved_with_changes(replacements, members, standing)
    problems += clashing_rows(rows, members, standing, replacements)
    if rows and method != SUM:
        problems.append(rows_without_sum(members[rows[0].member].label, method))
    problems += missing_foundations(members)
    modules = {
        name: ModulePlan(name, shape.type, (shape.shape[-2], shape.shape[-1]), tuple(found), experts=_experts(shape))
        for name, found in sorted(factors.items(), key=lambda item: natural_order(item[0]))
        if len((shape := shapes[name]).shape) == (3 if shape.type in EXPERTS else 2)
    }
    return StackPlan(
        base, tuple(members), modules, tuple(replacements), tuple(rows), tuple(problems), method,
        options or MethodOptions(),
    )  # fmt: skip


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
