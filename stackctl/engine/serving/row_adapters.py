"""Adapters beside a base, with a weight for each row of a batch: y += ((x Aᵀ) · w) Bᵀ.

The factors of all members in use are concatenated along their rank, as a stack's are when it is exported; a row's
``w`` holds each member's weight on that member's columns, and zero on the others'. So rows of different stacks share
every product with the base, and no row changes another.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from stackctl.engine.tensors import MemberTensors
from stackctl.plan.build import plan_stack
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import StackPlan

_KINDS = (nn.Linear, nn.Embedding, Conv1D)
"""Modules whose output grows by exactly the product of the factors; a subclass may do more with its weight."""

RowFactors = dict[str, tuple[Tensor, Tensor]]
"""By module: A (rank, in) and B (out, rank), the scaling in B."""


@dataclass(frozen=True)
class _Block:
    """A module's concatenated factors; ``columns`` says which member each column of the rank belongs to."""

    a: Tensor
    b: Tensor
    columns: tuple[int, ...]
    embeds: bool


RowWeights = Mapping[str, float | Mapping[str, float]]
"""By digest: the weight of a member of a row, or where it has weights by layer, that on each module by its name."""


def row_weights(plan: StackPlan) -> RowWeights:
    """The weights of every member of a stack that has any but zero."""
    weights: dict[str, float | Mapping[str, float]] = {}
    for index, member in enumerate(plan.members):
        if member.is_used and member.layer_weights:
            modules = plan.modules.values()
            weights[member.digest] = {m.name: f.weight for m in modules for f in m.factors if f.member == index}
        elif member.is_used:
            weights[member.digest] = member.weight
    return weights


class RowAdapters:
    """The members in memory, at most ``limit`` beyond those in use, and the hooks that add them to the base."""

    def __init__(self, model: Any, limit: int) -> None:
        self._model, self._limit = model, limit
        self._resident: OrderedDict[str, RowFactors] = OrderedDict()
        self._active: tuple[str, ...] = ()
        self._blocks: dict[str, _Block] = {}
        self._weights: dict[str, Tensor] = {}
        self._rows: tuple[RowWeights, ...] = ()
        self._row_of: Tensor | None = None  # of each token
        self._hooked: set[str] = set()

    @property
    def resident(self) -> tuple[str, ...]:
        """The digests in memory, least recently used first."""
        return tuple(self._resident)

    def carries(self, plan: StackPlan) -> bool:
        """Whether a stack can be kept beside the base: a plain sum of factors on plain modules."""
        if plan.method != SUM or plan.replacements or plan.token_rows:
            return False
        return all(
            not module.is_experts and type(self._model.get_submodule(module.name)) in _KINDS
            for module in plan.modules.values()
        ) and len({member.digest for member in plan.members}) == len(plan.members)

    def load(self, plan: StackPlan, in_use: Collection[str]) -> None:
        """Have a stack's members in memory; the least recently used that nobody uses make room.

        Raises:
            VerificationFailed: a tensor is damaged or not finite.
        """
        wanted = {member.digest: member for member in plan.members if member.is_used}
        for digest, member in wanted.items():
            if digest not in self._resident:
                self._resident[digest] = self._read(
                    plan_stack(plan.base, [replace(member, weight=1.0, layer_weights={}, trained_on=())])
                )
        for digest in wanted:
            self._resident.move_to_end(digest)
        for digest in list(self._resident):
            if len(self._resident) <= self._limit:
                break
            if digest not in wanted and digest not in in_use:
                del self._resident[digest]

    def _read(self, plan: StackPlan) -> RowFactors:
        """All factors of a single member, also those on which this or that stack has a weight of zero."""
        factors: RowFactors = {}
        with torch.no_grad(), MemberTensors(plan) as tensors:
            for module in plan.modules.values():
                weight = self._model.get_submodule(module.name).weight
                dtype = weight.dtype if weight.dtype.is_floating_point else self._model.dtype
                [(a, b, scaling)] = tensors.factors(module)
                factors[module.name] = (a.to(weight.device, dtype), (b * scaling).to(weight.device, dtype))
        return factors

    def set_rows(self, rows: Sequence[RowWeights], tokens: Sequence[int] = ()) -> None:
        """The weights of each row of the next forward pass; no rows: the base alone. ``tokens`` are how many it sees of
        each, if those of all stand one behind another and are not as many of each."""
        self._row_of = torch.arange(len(tokens)).repeat_interleave(torch.tensor(tokens)) if tokens else None
        if len(rows) == len(self._rows) and all(one is other for one, other in zip(rows, self._rows, strict=True)):
            return
        self._rows = tuple(rows)
        used = {digest for row in rows for digest in row}
        if not used <= set(self._active):
            self._concatenate(tuple(sorted(used)))
        self._weights = {}
        made: dict[object, Tensor] = {}
        for name, block in self._blocks.items() if used else ():
            values = tuple(tuple(_on(row.get(digest, 0.0), name) for digest in self._active) for row in rows)
            key = (values, block.columns, block.b.device, block.b.dtype)
            if key not in made:
                made[key] = torch.tensor(values)[:, list(block.columns)].to(block.b.device, block.b.dtype)
            self._weights[name] = made[key]

    def _concatenate(self, active: tuple[str, ...]) -> None:
        self._active = active
        names = dict.fromkeys(name for digest in active for name in self._resident[digest])
        self._blocks = {}
        for name in names:
            own = [(i, self._resident[d][name]) for i, d in enumerate(active) if name in self._resident[d]]
            module = self._model.get_submodule(name)
            self._blocks[name] = _Block(
                torch.cat([a for _, (a, _) in own]),
                torch.cat([b for _, (_, b) in own], dim=1),
                tuple(i for i, (a, _) in own for _ in range(a.shape[0])),
                isinstance(module, nn.Embedding),
            )
            if name not in self._hooked:
                self._hooked.add(name)
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            block = self._blocks.get(name)
            weights = self._weights.get(name)
            if block is None or weights is None:
                return None
            x = inputs[0]
            inner = functional.embedding(x, block.a.T) if block.embeds else functional.linear(x, block.a)
            # Some modules see (rows · tokens, width): the rows' tokens one after another; a head only the last of each.
            if self._row_of is not None and x.shape[0] == len(self._row_of):
                weights = weights[self._row_of]
            inner = inner.view(len(weights), -1, inner.shape[-1]) * weights[:, None]
            return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), block.b.T).view(output.shape)

        return add


def _on(weight: float | Mapping[str, float], module: str) -> float:
    return weight.get(module, 0.0) if isinstance(weight, Mapping) else weight
