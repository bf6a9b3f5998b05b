"""A stack's members live beside the base with nothing but their weights to learn.

Each weight stands on a group of modules: all of a member's, those of one layer, or a single one. On a linear layer a
member adds w · scaling · B (A x) to what the layer makes of x. Anything else, an embedding, experts, the head, a layer
whose weight the model reads without calling it, has its whole weight changed by w · scaling · BA for each forward pass,
as folding would. So have rows of single tokens: own + w · (value - own).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stackctl.engine import algebra
from stackctl.engine.base.module_shapes import is_called
from stackctl.engine.merging import matrices
from stackctl.engine.tensors import MemberTensors
from stackctl.engine.token_rows import refuse_unlike_peft
from stackctl.lora.module_grid import grid_place
from stackctl.lora.target_modules import natural_order
from stackctl.plan.layer_weights import Per, Weights
from stackctl.plan.stack_plan import ModulePlan, StackPlan

Group = tuple[int, str]
"""A member's number, and the name of a layer or module; empty for all of the member."""


@dataclass(frozen=True)
class WeightedFactors:
    """The factors of every member on every module, in float32, and which weight each of them has.

    ``groups`` are the weights, in an order that depends on what the members are and not on where they stand, so that
    the same members give the same bits in any order. ``factors[module]`` are (A, B, scaling) with ``index[module]``
    the place of each one's weight among the groups; ``rows[module]`` are tokens (n,) with their values (n, width), and
    the place of their weight.
    """

    plan: StackPlan
    groups: tuple[Group, ...]
    factors: Mapping[str, Sequence[algebra.Factors]]
    index: Mapping[str, Sequence[int]]
    rows: Mapping[str, Sequence[tuple[Tensor, Tensor, int]]]

    def start(self) -> list[float]:
        """The weights that the plan's members have now; of a group whose modules differ, their mean."""
        found: dict[Group, list[float]] = {}
        weights = [Weights.of(m.weight, m.layer_weights) for m in self.plan.members]
        in_rows = {name: [place for *_, place in own] for name, own in self.rows.items()}
        for name, places in [*self.index.items(), *in_rows.items()]:
            for number in places:
                group = self.groups[number]
                found.setdefault(group, []).append(weights[group[0]].at(name))
        return [sum(found[group]) / len(found[group]) for group in self.groups]


def read_factors(plan: StackPlan, per: Per) -> WeightedFactors:
    """The factors of a plan in which every member has a weight other than zero, and the weights that ``per`` asks for.

    Raises:
        VerificationFailed: a tensor holds NaN or infinity.
    """
    order = sorted(range(len(plan.members)), key=lambda number: (plan.members[number].digest, number))
    rank = {member: number for number, member in enumerate(order)}

    def group(member: int, module: str) -> Group:
        return member, {"member": "", "layer": grid_place(module).name, "module": module}[per]

    named = {group(factor.member, module.name) for module in plan.modules.values() for factor in module.factors}
    named |= {group(trained.member, trained.module) for trained in plan.token_rows}
    groups = sorted(named, key=lambda g: (rank[g[0]], natural_order(g[1])))
    numbers = {one: number for number, one in enumerate(groups)}
    factors: dict[str, list[algebra.Factors]] = {}
    index: dict[str, list[int]] = {}
    rows: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    with MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            read = list(zip(module.factors, tensors.factors(module), strict=True))
            read.sort(key=lambda both: rank[both[0].member])
            factors[module.name] = [(a, b, planned.scaling) for planned, (a, b, _) in read]
            index[module.name] = [numbers[group(planned.member, module.name)] for planned, _ in read]
        for trained in plan.token_rows:
            value = tensors.of(trained.member, trained.tensor).float()
            own = torch.tensor(trained.tokens), value, numbers[group(trained.member, trained.module)]
            rows.setdefault(trained.module, []).append(own)
    return WeightedFactors(plan, tuple(groups), factors, index, rows)


@contextlib.contextmanager
def attached(model: nn.Module, weighted: WeightedFactors, weights: Callable[[], Tensor]) -> Iterator[None]:
    """The members live on a base while the body runs.

    Args:
        weights: one number for each of the groups, (groups,), asked for again in each forward pass.
    """
    refuse_unlike_peft(weighted.plan, model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    with contextlib.ExitStack() as stack:
        for module in weighted.plan.modules.values():
            places = torch.tensor(weighted.index[module.name])
            factors = weighted.factors[module.name]
            layer = None if module.is_experts else model.get_submodule(module.name)
            plain = module.type in ("Linear", "Conv1D") and is_called(model, module.name)
            if layer is not None and layer is not head and plain:
                stack.enter_context(_beside(layer, factors, places, weights))
            else:
                changed = _Changed(module, factors, places, weights)
                stack.enter_context(_inside(model, module.parameter, changed))
        for name, rows in weighted.rows.items():
            stack.enter_context(_inside(model, f"{name}.weight", _WithRows(rows, weights)))
        yield


@contextlib.contextmanager
def _beside(
    layer: nn.Module, factors: Sequence[algebra.Factors], places: Tensor, weights: Callable[[], Tensor]
) -> Iterator[None]:
    """Add to a layer's output while the body runs."""
    device = next(layer.parameters()).device
    a = torch.cat([A for A, _, _ in factors]).to(device)  # (Σ rank, in)
    b = torch.cat([B * s for _, B, s in factors], dim=1).to(device)  # (out, Σ rank)
    spread = torch.repeat_interleave(places, torch.tensor([A.shape[0] for A, _, _ in factors]))

    def add(_: nn.Module, given: tuple[Any, ...], made: Tensor) -> Tensor:
        inner = nn.functional.linear(given[0].to(a.dtype), a) * weights().to(a.dtype).to(device)[spread.to(device)]
        return made + nn.functional.linear(inner, b).to(made.dtype)

    with layer.register_forward_hook(add):
        yield


@contextlib.contextmanager
def _inside(model: nn.Module, parameter: str, changed: nn.Module) -> Iterator[None]:
    """Change a parameter while the body runs."""
    parent, _, name = parameter.rpartition(".")
    owner = model.get_submodule(parent)
    parametrize.register_parametrization(owner, name, changed, unsafe=True)
    try:
        yield
    finally:
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)


class _Changed(nn.Module):
    """A parameter with the members' deltas added to it."""

    def __init__(
        self, module: ModulePlan, factors: Sequence[algebra.Factors], places: Tensor, weights: Callable[[], Tensor]
    ) -> None:
        super().__init__()
        self._module, self._factors, self._places, self._weights = module, factors, places, weights
        self.learned = getattr(weights, "parameter", None)
        """Where the numbers come from, so that whoever looks for what is trained finds it here."""

    def forward(self, weight: Tensor) -> Tensor:
        now = self._weights().float().to(weight.device)[self._places.to(weight.device)]
        read = [(A.to(weight.device), B.to(weight.device), s) for A, B, s in self._factors]
        deltas = []
        for own in matrices(self._module, read):
            parts = [s * (B @ A) for A, B, s in own]
            total = (torch.stack(parts) * now[:, None, None]).sum(0)
            deltas.append(total.T if self._module.is_transposed else total)
        delta = torch.stack(deltas) if self._module.is_experts else deltas[0]
        return (weight.float() + delta).to(weight.dtype)


class _WithRows(nn.Module):
    """An embedding or a head with the members' rows of single tokens in it, each as far from its own as its weight."""

    def __init__(self, rows: Sequence[tuple[Tensor, Tensor, int]], weights: Callable[[], Tensor]) -> None:
        super().__init__()
        self._rows, self._weights = rows, weights
        self.learned = getattr(weights, "parameter", None)

    def forward(self, weight: Tensor) -> Tensor:
        now, changed = self._weights().float().to(weight.device), weight
        for tokens, values, number in self._rows:
            index = tokens.to(weight.device)
            own = weight[index].float()
            new = own + now[number] * (values.to(weight.device) - own)
            changed = changed.index_copy(0, index, new.to(weight.dtype))
        return changed
