"""Frozen for free, without a clock: every operator of a training step, at any depth of frozen adapters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMES = ("one", "two", "three", "four")
RANK = 3
"""Of each frozen adapter: neither 3 nor 6 nor 12 is a size of the tiny Llama."""
LINEAR = 14
"""Its linear modules: seven in each of two layers."""

Operator = tuple[str, tuple[tuple[int, ...], ...], tuple[torch.dtype, ...]]


class Operators(TorchDispatchMode):
    """What runs while it is entered: each operator with the shapes and types of the tensors that it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operator] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.seen.append((str(function), tuple(tuple(t.shape) for t in tensors), tuple(t.dtype for t in tensors)))
        return function(*args, **(kwargs or {}))

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        self.__exit__(None, None, None)


def of_a_step(h: Any, depth: int, frozen: str) -> list[Operator]:
    """The operators from the end of a training's first optimizer step to that of its second one.

    These are reading a batch, forward, backward, clipping, optimizer and schedule.
    """
    operators = Operators()
    h.at_steps({1: operators.start, 2: operators.stop})
    options = ("--max-steps", 2, "--dtype", "float32", "--frozen", frozen)
    found = h.train(f"new-{frozen}-{depth}", *options, on="+".join(NAMES[:depth]) or None)
    wanted = "none" if not depth else "live" if frozen == "live" else "fold"
    assert found["frozen"] == wanted
    names = Counter(name for name, _, _ in operators.seen)
    assert names["aten._foreach_sqrt.default"] or names["aten._fused_adamw_.default"], "the optimizer is in it"
    return operators.seen


def products(operators: list[Operator]) -> list[Operator]:
    """Those that multiply matrices."""
    return [
        operator for operator in operators if operator[0].split(".")[1] in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
    ]


@pytest.fixture
def h(tiny_registry: Any) -> Any:
    found = tiny_registry()
    for seed, name in enumerate(NAMES, 1):
        found.add(name, seed=seed, r=RANK, lora_dropout=0.5)
    return found


def test_a_folded_stack_costs_no_operator_at_any_depth(h: Any) -> None:
    alone = of_a_step(h, 0, "auto")
    assert len(products(alone)) > 6 * LINEAR, "of each module two or three forward, five or so backward"
    for depth, frozen in ((1, "auto"), (2, "auto"), (4, "auto"), (4, "fold")):
        assert of_a_step(h, depth, frozen) == alone
    assert of_a_step(h, 1, "live") != alone, "an adapter more would show"


def test_a_live_stack_costs_one_adapter_without_dropout_however_deep(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trap: PEFT runs every live adapter by itself, with the dropout that it was trained with."""
    # what stands on a live one is not fused
    monkeypatch.setattr("stackctl.engine.training.attach.fuse", lambda model: 0)
    alone, one, four = (of_a_step(h, depth, "live") for depth in (0, 1, 4))
    assert [name for name, _, _ in four] == [name for name, _, _ in one]
    assert not [name for name, _, _ in four if "dropout" in name or "bernoulli" in name]
    # Two products forward and two backward; the first layer's q, k and v hand no gradient down.
    extra = 4 * LINEAR - 2 * 3
    assert len(products(four)) == len(products(alone)) + extra
    ranks = Counter(RANK * n for _, shapes, _ in products(four) for n in range(1, 5) if RANK * n in sum(shapes, ()))
    assert ranks == {4 * RANK: extra}, "of the ranks of all four together"
    naive = [raw_forward(h, depth) for depth in (1, 4)]
    assert naive[1] - naive[0] == 3 * 2 * LINEAR, "in raw PEFT each one costs"


def raw_forward(h: Any, depth: int) -> int:
    """The products of a forward pass of raw PEFT with all members live."""
    model = oracle.live(h.base, *h.members(*((name, 1) for name in NAMES[:depth])))
    with Operators() as operators:
        oracle.logits(model)
    return len(products(operators.seen))
