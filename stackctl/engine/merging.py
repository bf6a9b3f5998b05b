"""What a plan's method makes of each module's factors: as a full delta to fold, or as a pair to write.

The sum never forms more than it must; the other methods are looked up in :mod:`stackctl.plan.methods` and measured
against the exact sum.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from stackctl.engine import algebra, aligned_merging
from stackctl.engine.tensors import MemberTensors, decomposing, misfit
from stackctl.machine.resources import cores, main_memory
from stackctl.plan.methods import METHODS, SUM
from stackctl.plan.stack_plan import ModulePlan, StackPlan

T = TypeVar("T")
_MATRICES = 6
"""Matrices of a module's size, beside one for each member, that a method which makes full ones has at most."""
_FUNCTIONS = {"algebra": algebra, "aligned_merging": aligned_merging}


def matrices(module: ModulePlan, factors: Sequence[algebra.Factors]) -> list[Sequence[algebra.Factors]]:
    """The factors of each matrix of a module: of all experts one by one, of anything else the one it is."""
    return list(algebra.split_experts(factors, module.experts)) if module.is_experts else [factors]


def combine(plan: StackPlan, module: ModulePlan, factors: Sequence[algebra.Factors]) -> algebra.Pair | Tensor:
    """A matrix's delta by the plan's method: a pair (A, B), or a full matrix (out, in) where the method makes one.

    Raises:
        VerificationFailed: what is to be decomposed does not fit float32.
    """
    module_name, name = METHODS[plan.method].function.split(".")
    function = getattr(_FUNCTIONS[module_name], name)
    if plan.method == SUM:
        pair: algebra.Pair = function(factors)
        return pair
    with decomposing(module.name, factors):
        result: algebra.Pair | Tensor = function(factors, **_options(plan, module))
    return result


def _options(plan: StackPlan, module: ModulePlan) -> dict[str, Any]:
    """The method's options, with a seed of the module's own, so that the order of modules changes nothing."""
    options = {key: getattr(plan.options, key) for key in plan.options.__struct_fields__}
    if options["seed"] is not None:
        name = hashlib.sha256(f"{options['seed']} {module.name}".encode()).digest()
        options["seed"] = int.from_bytes(name[:7], "little")
    return options


def module_delta(plan: StackPlan, module: ModulePlan, factors: Sequence[algebra.Factors]) -> Tensor:
    """The full delta in float32: (out, in), of experts (experts, out, in)."""
    if plan.method == SUM:
        return exact_delta(module, factors)
    made = _combined(plan, module, factors)
    full = [one if isinstance(one, Tensor) else one[1] @ one[0] for one in made]
    return torch.stack(full) if module.is_experts else full[0]


def exact_delta(module: ModulePlan, factors: Sequence[algebra.Factors]) -> Tensor:
    """The exact sum in float32, in the shape of :func:`module_delta`."""
    made = [algebra.delta(own) for own in matrices(module, factors)]
    return torch.stack(made) if module.is_experts else made[0]


def module_pair(plan: StackPlan, module: ModulePlan, factors: Sequence[algebra.Factors]) -> algebra.Pair:
    """The delta as a pair, of experts all of theirs; a full matrix is cut to the rank that the plan gives it."""
    made, rank = _combined(plan, module, factors), plan.rank_of(module)
    with decomposing(module.name, factors):
        pairs = [algebra.factorise(one, rank) if isinstance(one, Tensor) else one for one in made]
    return algebra.join_experts(pairs) if module.is_experts else pairs[0]


def pair_error(module: ModulePlan, factors: Sequence[algebra.Factors], pair: algebra.Pair) -> float:
    """‖B'A' - sum‖ / ‖sum‖ of a pair that :func:`module_pair` made, over all matrices of the module."""
    lost, total = _distance(module, factors, [made[0][:2] for made in matrices(module, [(*pair, 1.0)])])
    return float((lost / total) ** 0.5) if total else 0.0


def _combined(plan: StackPlan, module: ModulePlan, factors: Sequence[algebra.Factors]) -> list[algebra.Pair | Tensor]:
    return [combine(plan, module, own) for own in matrices(module, factors)]


def _distance(
    module: ModulePlan, factors: Sequence[algebra.Factors], made: Sequence[algebra.Pair | Tensor]
) -> tuple[float, float]:
    """‖made - sum‖² and ‖sum‖² over the matrices of a module."""
    lost = total = 0.0
    for own, one in zip(matrices(module, factors), made, strict=True):
        exact = algebra.concatenate(own)
        norm = algebra.product_norm(*exact)
        gap = algebra.distance(one, own) if isinstance(one, Tensor) else algebra.relative_error(exact, one) * norm
        lost, total = lost + gap**2, total + norm**2
    return lost, total


@dataclass(frozen=True)
class Measured:
    """How far a method's result is from the exact sum: ‖made - sum‖ / ‖sum‖ over all modules, and the worst one."""

    relative_error: float
    worst: float
    worst_module: str
    rank: int


def measure(plan: StackPlan, progress: Callable[[float], None] = lambda _: None) -> Measured:
    """Compare a plan's method with the exact sum, module by module, in float64.

    ``progress`` is called with the share of the modules (0 to 1) that were compared.

    Raises:
        VerificationFailed: a member's tensor is not finite, or what the method makes of them does not fit float32.
    """

    def compared(module: ModulePlan, factors: Sequence[algebra.Factors]) -> tuple[float, float, int]:
        made = _combined(plan, module, factors)
        rank = max(min(one.shape) if isinstance(one, Tensor) else one[0].shape[0] for one in made)
        return *_distance(module, factors, made), rank

    all_lost = all_total = worst = 0.0
    worst_module, rank = "", 0
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for done, (module, (lost, total, own_rank)) in enumerate(each_module(plan, tensors, compared), 1):
            if not math.isfinite(lost) or not math.isfinite(total):
                raise misfit(module.name, "float32")
            all_lost, all_total, rank = all_lost + lost, all_total + total, max(rank, own_rank)
            if total and (lost / total) ** 0.5 > worst:
                worst, worst_module = (lost / total) ** 0.5, module.name
            progress(done / len(plan.modules))
    return Measured((all_lost / all_total) ** 0.5 if all_total else 0.0, worst, worst_module, rank)


def found_ranks(plan: StackPlan) -> dict[str, int]:
    """The rank that a method which looks at the tensors for it gives every module."""
    with torch.no_grad(), MemberTensors(plan) as tensors:
        return {
            name: module_pair(plan, module, tensors.factors(module))[0].shape[0] // module.experts
            for name, module in plan.modules.items()
        }


def made_pairs(plan: StackPlan, dtype: torch.dtype) -> Iterator[tuple[ModulePlan, algebra.Pair, float]]:
    """Every module with its A (rank, in) and B (out, rank) in a dtype, and their relative error: none of a sum in
    float32.

    Raises:
        VerificationFailed: a member's tensor is not finite.
    """
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            factors = tensors.factors(module)
            a, b = (factor.to(dtype) for factor in module_pair(plan, module, factors))
            lossless = dtype == torch.float32 and plan.method == SUM
            yield module, (a, b), 0.0 if lossless else pair_error(module, factors, (a.float(), b.float()))


def each_module(
    plan: StackPlan, tensors: MemberTensors, work: Callable[[ModulePlan, Sequence[algebra.Factors]], T]
) -> Iterator[tuple[ModulePlan, T]]:
    """Every module in the plan's order with what ``work`` makes of its factors, on a thread for each core.

    Threads, because torch lets go of Python's lock while it computes; each is a single one for torch, which waits less
    than all of them on one matrix. No more modules are begun than half of the free memory holds. Of a sum, which is
    factors side by side, one module is made at a time.
    """
    if plan.method == SUM:
        for module in plan.modules.values():
            yield module, work(module, tensors.factors(module))
        return
    threads, workers = torch.get_num_threads(), _workers(plan)
    pool = ThreadPoolExecutor(workers, "module", initializer=torch.set_num_threads, initargs=(1,))
    waiting = deque[tuple[ModulePlan, Future[T]]]()
    try:
        for module in plan.modules.values():
            if len(waiting) > workers:
                begun, result = waiting.popleft()
                yield begun, result.result()
            waiting.append((module, pool.submit(torch.no_grad()(work), module, tensors.factors(module))))
        while waiting:
            begun, result = waiting.popleft()
            yield begun, result.result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _workers(plan: StackPlan) -> int:
    if METHODS[plan.method].low_rank:
        return cores()
    largest = max(
        (4 * m.experts * m.shape[0] * m.shape[1] * (len(m.factors) + _MATRICES) for m in plan.modules.values()),
        default=1,
    )
    return max(1, min(cores(), main_memory().available // 2 // largest))
