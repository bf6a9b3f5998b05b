"""The compact notation of modules, and PEFT's rules for choosing them (held against PEFT itself in integration/)."""

import pytest

from stackctl.core.errors import Usage
from stackctl.core.schema import ModuleShape
from stackctl.lora.target_modules import (
    compact_modules,
    compact_names,
    expand_modules,
    expected_targets,
    lora_rank,
    lora_scaling,
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


def test_names_mean_endings_between_dots():
    assert len(targets(target_modules=["q_proj"])) == 12
    assert targets(target_modules=["proj"]) == set()
    assert targets(target_modules=["embed_tokens", "lm_head"]) == {"model.embed_tokens", "lm_head"}


def test_one_text_is_a_regex_on_the_whole_name():
    assert len(targets(target_modules=r".*\.(q|v)_proj")) == 24
    assert targets(target_modules="q_proj") == set()
    assert len(targets(target_modules=r".*layers\.1\..*")) == 2


def test_all_linear_leaves_out_the_head():
    assert len(targets(target_modules="ALL-Linear")) == 24
    assert "lm_head" in targets(target_modules="all-linear", output=None)


def test_exclusion():
    assert len(targets(target_modules=["q_proj", "v_proj"], exclude_modules=["v_proj"])) == 12
    assert len(targets(target_modules="all-linear", exclude_modules=r".*\.q_proj")) == 12
    assert targets(target_modules=["lm_head"], modules_to_save=["lm_head"]) == set()


def test_layers():
    assert len(targets(target_modules=["q_proj"], layers_to_transform=[1, 10])) == 2
    assert targets(target_modules=["q_proj"], layers_to_transform=1) == {"model.layers.1.self_attn.q_proj"}
    assert len(targets(target_modules=["q_proj"], layers_to_transform=[])) == 12
    assert len(targets(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h", "layers"])) == 1
    assert targets(target_modules=["q_proj"], layers_to_transform=[1], layers_pattern="blocks") == set()
    assert targets(target_modules=["lm_head"], layers_to_transform=[1]) == {"lm_head"}


def test_a_full_name_is_meant_whatever_the_layers():
    name = "model.layers.3.self_attn.q_proj"
    assert targets(target_modules=[name, "v_proj"], layers_to_transform=[0]) == {
        name,
        "model.layers.0.self_attn.v_proj",
    }


@pytest.mark.parametrize("nothing", [None, [], ""])
def test_no_targets_say_nothing(nothing):
    assert targets(target_modules=nothing) is None


def test_rank_and_scaling():
    config = {
        "r": 4,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 16, "self_attn.v_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    }
    q, v, o = "m.self_attn.q_proj", "m.self_attn.v_proj", "m.self_attn.o_proj"
    assert [lora_rank(config, name) for name in (q, v, o)] == [16, 2, 4]
    assert [lora_scaling(config, name) for name in (q, v, o)] == [0.5, 1.5, 2.0]
    assert lora_scaling(config | {"use_rslora": True}, q) == 2.0


def test_patterns_do_not_match_in_the_middle_of_a_name():
    config = {"r": 4, "rank_pattern": {"proj": 16, "0.x": 3}}
    assert lora_rank(config, "m.q_proj") == 4
    assert lora_rank(config, "m.10.x") == 4
    assert lora_rank(config, "m.0.x") == 3


def test_the_first_pattern_wins():
    assert lora_rank({"r": 4, "rank_pattern": {".*": 2, "q": 3}}, "m.q") == 2


def test_defaults_are_pefts():
    assert lora_rank({}, "q") == 8
    assert lora_scaling({}, "q") == 1.0


def test_a_few_bytes_do_not_stand_for_more_modules_than_memory_holds():
    with pytest.raises(Usage, match="more than 1,000,000 modules"):
        expand_modules({"{0-99999999}.{0-99999999}": ModuleShape(type="Linear", shape=[1, 1])})
