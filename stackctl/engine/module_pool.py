"""A plan's modules one after the other, worked on by all cores at once, with a bound on what is in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from stackctl.engine.algebra import Factors
from stackctl.engine.tensors import MemberTensors
from stackctl.machine.resources import cores, main_memory
from stackctl.plan.methods import METHODS, SUM
from stackctl.plan.model import ModulePlan, StackPlan

T = TypeVar("T")
_MATRICES = 6
"""Matrices of a module's size, beside one for each member, that a method which makes full ones has at most."""


def each_module(
    plan: StackPlan, tensors: MemberTensors, work: Callable[[ModulePlan, Sequence[Factors]], T]
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
