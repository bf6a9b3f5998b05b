"""A stack is folded into memory of its own, where the base is mapped: the same bits as in place, and a way back."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from stackctl.engine.base import private_weights
from stackctl.engine.folding import Adder
from stackctl.engine.models import StackedModel

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only there the system tells what is mapped")


def weights(stacked: StackedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in stacked.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def two(h: Any) -> Any:
    h.add("style", seed=1, target_modules=["q_proj", "down_proj"])
    h.add("instruct", seed=2, target_modules=["down_proj", "up_proj"])
    return h


@LINUX
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral"])
def test_the_bits_are_those_of_folding_in_place(tiny_registry: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1, target_modules="all-linear" if name != "mixtral" else ["q_proj", "o_proj"])
    plan = h.plan("style:0.7")
    apart, in_place = h.load(), h.load()
    before = weights(apart)
    apart.use(plan)
    monkeypatch.setattr(private_weights, "_mapped_ranges", lambda _: [])
    in_place.use(plan)
    assert not same(weights(apart), before)
    assert same(weights(apart), weights(in_place))
    assert apart.rounding_error == in_place.rounding_error > 0
    apart.restore()
    in_place.restore()
    assert same(weights(apart), before) and same(weights(in_place), before)


@LINUX
def test_the_base_stays_mapped_and_the_memory_is_used_again(two: Any) -> None:
    stacked = two.load()
    weight = stacked.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    mapped, values = weight.data_ptr(), weight.clone()
    stacked.use(two.plan("style"))
    own = weight.data_ptr()
    assert own != mapped
    stacked.use(two.plan("instruct"))
    assert weight.data_ptr() == own
    stacked.restore()
    assert weight.data_ptr() == mapped
    assert torch.equal(weight, values)


def test_a_second_stack_is_added_to_the_first(two: Any) -> None:
    stacked = two.load()
    before = weights(stacked)
    stacked.fold(two.plan("style"))
    stacked.fold(two.plan("instruct"))
    twice = weights(stacked)
    stacked.restore()
    assert same(weights(stacked), before)
    stacked.use(two.plan("style+instruct"))
    assert all(torch.allclose(twice[name], value, atol=1e-6) for name, value in weights(stacked).items())


def test_a_fold_that_fails_half_way_leaves_the_way_back(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = two.load()
    before, add = weights(stacked), Adder.add
    added = []

    def fail(self: Adder, *arguments: Any) -> None:
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(add(self, *arguments))

    monkeypatch.setattr(Adder, "add", fail)
    with pytest.raises(KeyboardInterrupt):
        stacked.use(two.plan("style+instruct"))
    monkeypatch.setattr(Adder, "add", add)
    stacked.use(two.plan("instruct"))
    stacked.restore()
    assert same(weights(stacked), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounding_takes_is_that_of_float64(dtype: torch.dtype) -> None:
    from stackctl.engine.folding import Delta

    torch.manual_seed(0)
    base = torch.randn(600, 500).to(dtype)  # more than one block of rows
    left, right = torch.randn(600, 4), torch.randn(4, 500) * 1e-2
    weight, adder = base.clone(), Adder()
    adder.add(weight, Delta(left, right))
    change = torch.cat([left[at : at + 524] @ right for at in (0, 524)]).double()
    assert torch.equal(weight, (base.float() + change.float()).to(dtype))
    lost = (weight.double() - base.double() - change).norm() / change.norm()
    assert adder.rounding.error == pytest.approx(float(lost), rel=1e-3)
