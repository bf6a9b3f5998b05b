"""Products of rows with a weight are those of the module, whichever way they are computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stackctl.engine.generation import row_products
from stackctl.engine.generation.row_products import Packing, RowProduct, pack, product
from stackctl.machine.resources import Memory

PROCESSORS = ["AVX512", "AVX2", "DEFAULT"]
COUNTS = [1, 2, 3, 4, 8, 12, 13, 16, 31, 32, 33, 64, 70]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def linear(bias: bool = False, out: int = 96, width: int = 40) -> nn.Linear:
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def packed(module: nn.Linear) -> RowProduct:
    made = product(module)
    assert isinstance(made, RowProduct)
    pack([made])
    return made


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways to multiply on a processor of a kind, which every processor can go."""
    monkeypatch.setattr(row_products, "_processor", lambda: request.param)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [96, 50])
@pytest.mark.usefixtures("processor")
def test_products_are_the_modules(bias: bool, out: int) -> None:
    module = linear(bias, out)
    plain, quick = product(module), packed(module)
    assert (quick.packed is not None) == torch.backends.mkl.is_available()
    for count in COUNTS:
        rows = torch.randn(count, 40)
        torch.testing.assert_close(plain(rows), module(rows))
        torch.testing.assert_close(quick(rows), module(rows))


@pytest.mark.usefixtures("processor")
def test_hooks_count_in_their_order() -> None:
    module = linear()
    made = packed(module)
    module.register_forward_hook(lambda _, inputs, output: output + inputs[0].sum(-1, keepdim=True))
    module.register_forward_hook(lambda *_: None)
    last = module.register_forward_hook(lambda _, inputs, output: output * 2)
    for count in COUNTS:
        rows = torch.randn(count, 40)
        torch.testing.assert_close(made(rows), module(rows))
    last.remove()
    before = module.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 3,))
    torch.testing.assert_close(made(rows), module(rows))
    before.remove()
    torch.testing.assert_close(made(rows), module(rows))


@pytest.mark.parametrize("missing", ["mkl", "operators", "memory", "right products", "float32"])
def test_what_cannot_be_packed_is_multiplied_as_it_is(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row_products._is_right.cache_clear()
    module = linear()
    if missing == "mkl":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    elif missing == "operators":
        monkeypatch.setattr(torch.ops, "mkl", object())
    elif missing == "memory":
        monkeypatch.setattr(row_products, "main_memory", lambda: Memory(10**9, 4 * 96 * 40 * 4 - 1))
    elif missing == "right products":
        right = row_products._by_packed
        monkeypatch.setattr(row_products, "_by_packed", lambda rows, *rest: right(rows, *rest) + (len(rows) == 31))
    else:
        module = module.to(torch.bfloat16)
    made = packed(module)
    row_products._is_right.cache_clear()
    assert made.packed is None
    rows = torch.randn(32, 40).to(module.weight.dtype)
    torch.testing.assert_close(made(rows), module(rows))


def test_modules_that_are_not_plain_are_called() -> None:
    class Other(nn.Linear):
        def forward(self, rows: Any) -> Any:
            return super().forward(rows) + 1

    module = Other(4, 4)
    assert product(module) is module
    pack([module])


@pytest.mark.parametrize(("steps", "packings"), [(16, 3), (15, 0)])
def test_a_few_rows_or_steps_need_no_packed_weight(steps: int, packings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    monkeypatch.setattr(row_products, "pack", lambda _: packed.append(count))
    for count in COUNTS:
        packing = Packing([])
        for _ in range(12):
            packing.prepare(count, steps)
    assert packed == [count for count in (13, 16, 31, 32, 33, 64, 70) for _ in range(packings)], "every four steps"
