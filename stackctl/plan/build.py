"""Entries and headers to a :class:`stackctl.plan.model.StackPlan`, with *all* problems at once. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stackctl.core.schema import Base, MethodOptions, ModuleShape
from stackctl.lora.checkpoint import TensorInfo
from stackctl.lora.target_modules import expand_modules, lora_rank, lora_scaling, natural_order
from stackctl.lora.target_parameters import EXPERTS, pattern_name, place_pairs
from stackctl.plan.methods import SUM
from stackctl.plan.model import Factor, ModulePlan, PlanMember, Problem, Replacement, StackPlan
from stackctl.plan.validate import (
    clashing_replacements,
    missing_foundations,
    refusals,
    same_adapter_twice,
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
    for index, member in enumerate(members):
        refused = refusals(member)
        problems += refused
        if not member.checkpoint.is_lora:
            continue
        config = member.checkpoint.config
        pairs = place_pairs(member.checkpoint.pairs, config, known)
        problems += unfitting_tensors(member, pairs, known, base)
        for module, pair in pairs.items():
            shape = known.get(module) if known is not None else _shape_from(pair, config, module)
            if shape is None or set(pair) != {"A", "B"}:
                continue
            shapes[module] = shape
            if member.weight != 0:
                scaling = lora_scaling(config, pattern_name(config, module, shape))
                rank = (pair["A"].shape[0] if pair["A"].shape else 0) // _experts(shape)
                factors.setdefault(module, []).append(Factor(index, pair["A"], pair["B"], rank, scaling))
        replacements += _replacements(index, member)
    problems += clashing_replacements(replacements, members)
    problems += missing_foundations(members)
    modules = {
        name: ModulePlan(name, shape.type, (shape.shape[-2], shape.shape[-1]), tuple(found), experts=_experts(shape))
        for name, found in sorted(factors.items(), key=lambda item: natural_order(item[0]))
        if len((shape := shapes[name]).shape) == (3 if shape.type in EXPERTS else 2)
    }
    return StackPlan(
        base, tuple(members), modules, tuple(replacements), tuple(problems), method, options or MethodOptions()
    )


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
