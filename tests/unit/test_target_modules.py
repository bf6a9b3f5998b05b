"""The compact notation of modules, and PEFT's rules for choosing them (held against PEFT itself in integration/)."""

import pytest

from stackctl.core.errors import Usage
from stackctl.core.schema import ModuleShape
from stackctl.lora.target_modules import (
    compact_modules,
    compact_names,
    expand_modules,
    expected_targets,
)

LINEAR = ModuleShape(type="Linear", shape=[8, 8])
WIDE = ModuleShape(type="Linear", shape=[16, 8])


def llama(layers=12):
    modules = {f"model.layers.{i}.self_attn.{n}": LINEAR for i in range(layers) for n in ("q_proj", "v_proj")}
    return modules | {
        "model.embed_tokens": ModuleShape(type="Embedding", shape=[32, 8]),
        "lm_head": ModuleShape(type="Linear", shape=[32, 8]),
    }


def test_thirty_layers_are_one_line():
    compact = compact_modules(llama(30))
    assert set(compact) == {
        "model.layers.{0-29}.self_attn.q_proj", "model.layers.{0-29}.self_attn.v_proj", "model.embed_tokens", "lm_head",
    }  # fmt: skip
    assert expand_modules(compact) == llama(30)


def test_names_that_differ_in_indices_are_one_in_natural_order():
    names = [f"model.layers.{i}.{n}" for i in (10, 2, 1, 0) for n in ("b", "a")]
    assert compact_names([*names, "model.norm"]) == ["model.layers.{0-2,10}.a", "model.layers.{0-2,10}.b", "model.norm"]
    assert compact_names([]) == []


def test_experts_in_layers_are_a_product():
    modules = {f"m.{i}.experts.{j}.w": LINEAR for i in range(3) for j in range(4)}
    assert set(compact_modules(modules)) == {"m.{0-2}.experts.{0-3}.w"}


def test_what_is_no_product_stays_apart():
    modules = {f"m.{i}.experts.{j}.w": LINEAR for i in range(3) for j in range(i + 1)}
    assert expand_modules(compact_modules(modules)) == modules


@pytest.mark.parametrize(
    "names",
    [
        ["a.0", "a.2", "a.3", "a.10"], ["a.007", "a.7"], ["a.²"], ["a.٣", "a.3"], ["0.a", "1.a"], ["a"], ["a.0"],
        ["a.b1", "a.b2"], ["a.99999999999999999999"], ["a.0.b", "a.b.0"], ["a.1.2.3", "a.1.2.4", "a.2.2.3"],
    ],
    ids=str,
)  # fmt: skip
def test_odd_indices_survive(names):
    modules = dict.fromkeys(names, LINEAR)
    assert expand_modules(compact_modules(modules)) == modules


def test_shapes_that_differ_between_layers():
    modules = {f"l.{i}.w": WIDE if i % 3 else LINEAR for i in range(20)}
    assert expand_modules(compact_modules(modules)) == modules


@pytest.mark.parametrize("pattern", ["a.{-}.b", "a.{}.b", "a.{3-}.b", "a.{,}.b", "a.{x}.b", "a.{0-1,}.b"])
def test_braces_that_are_no_ranges_are_part_of_the_name(pattern):
    assert expand_modules({pattern: LINEAR}) == {pattern: LINEAR}


def targets(output="lm_head", layers=12, **config):
    return expected_targets(config, llama(layers), output)


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_no_targets_say_nothing(nothing):
    assert targets(target_modules=nothing) is None


def test_a_few_bytes_do_not_stand_for_more_modules_than_memory_holds():
    with pytest.raises(Usage, match="more than 1,000,000 modules"):
        expand_modules({"{0-99999999}.{0-99999999}": ModuleShape(type="Linear", shape=[1, 1])})
