"""A plan is exact where a stack is sound, and says everything at once where it is not."""

import itertools

import msgspec
import pytest
from checkpoints import (
    HIDDEN,
    attention,
    lora_config,
    lora_tensors,
    make_base,
    member,
    memory_checkpoint,
)

from stackctl.core.errors import Incompatible, VerificationFailed
from stackctl.core.schema import ModuleShape
from stackctl.lora.target_modules import expand_modules
from stackctl.plan.build import plan_stack

BASE = make_base()
Q0 = "model.layers.0.self_attn.q_proj"
P = "base_model.model."


def codes(plan, severity=None):
    return sorted(p.code for p in plan.problems if severity in (None, p.severity))


def planned(config=None, tensors=None, base=BASE, dtypes=None, **rest):
    return plan_stack(base, [member(checkpoint=memory_checkpoint(config, tensors, dtypes), **rest)])


def test_a_sound_stack():
    other = memory_checkpoint(
        lora_config(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "up_proj"]),
        lora_tensors([*attention(["q_proj"]), "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"], rank=3),
    )
    plan = plan_stack(BASE, [member("style@1"), member("instruct@2", 0.5, other)])
    assert not plan.problems
    assert plan.check() is plan
    assert plan.expression == "style@1+instruct@2:0.5"
    assert plan.rank == 5
    assert plan.modules[Q0].rank == 5
    assert [f.member for f in plan.modules[Q0].factors] == [0, 1]
    assert [f.scaling for f in plan.modules[Q0].factors] == [2.0, pytest.approx(6 / 3**0.5)]
    assert plan.modules["model.layers.1.mlp.up_proj"].shape == (2 * HIDDEN, HIDDEN)
    assert len(plan.modules) == 6


@pytest.mark.parametrize(("kind", "code"), [("Matrix", "no_linear_layer"), ("Shared", "shared_modules")])
def test_a_layer_on_which_no_lora_runs_is_refused_for_that_alone(kind, code):
    """The checkpoint names it, so that to call it untargeted would be false."""
    odd = {Q0: ModuleShape(type=kind, shape=[HIDDEN, HIDDEN])}
    base = msgspec.structs.replace(BASE, modules={**expand_modules(BASE.modules), **odd})
    plan = planned(base=base)
    assert codes(plan) == [code]
    assert Q0 in plan.problems[0].message and "without them" in plan.problems[0].hint


def test_the_base_alone():
    plan = plan_stack(BASE, [])
    assert (plan.modules, plan.problems, plan.rank, plan.expression) == ({}, (), 0, "base")


def test_modules_come_in_natural_order():
    base = make_base()
    modules = {f"l.{i}.q_proj": next(iter(base.modules.values())) for i in range(12)}
    shape = next(iter(modules.values())).shape
    base = msgspec.structs.replace(base, modules={n: ModuleShape(type="Linear", shape=shape) for n in modules})
    tensors = {}
    for name in reversed(modules):
        tensors |= {f"{P}{name}.lora_A.weight": (2, shape[1]), f"{P}{name}.lora_B.weight": (shape[0], 2)}
    plan = plan_stack(base, [member(checkpoint=memory_checkpoint(lora_config(target_modules=["q_proj"]), tensors))])
    assert not plan.problems
    assert list(plan.modules) == list(modules)


def test_permutation_changes_nothing_but_order():
    members = [
        member("a@1", 1.0),
        member("b@1", -0.5, memory_checkpoint(lora_config(r=3), lora_tensors(rank=3))),
        member("c@1", 0.25, memory_checkpoint(lora_config(r=1, lora_alpha=7), lora_tensors(rank=1))),
    ]

    def content(plan):
        return {
            name: sorted((plan.members[f.member].label, f.rank, f.scaling, f.a, f.b) for f in module.factors)
            for name, module in plan.modules.items()
        }

    plans = [plan_stack(BASE, order) for order in itertools.permutations(members)]
    assert all(not plan.problems for plan in plans)
    assert all(content(plan) == content(plans[0]) for plan in plans)
    assert all(list(plan.modules) == list(plans[0].modules) for plan in plans)


def test_weight_zero_is_absence():
    dense = memory_checkpoint(
        lora_config(modules_to_save=["lm_head"]), lora_tensors() | {f"{P}lm_head.weight": (32, HIDDEN)}
    )
    rest = [member("b@1"), member("c@1", 1.0, dense)]
    without = plan_stack(BASE, rest)
    zero = plan_stack(BASE, [*rest, member("a@1", 0.0, dense, trained_on=("gone@1",))])
    assert zero.modules == without.modules
    assert zero.replacements == without.replacements
    assert not zero.problems
    assert [m.label for m in zero.members] == ["b@1", "c@1", "a@1"]
    assert zero.expression == "b@1+c@1+a@1:0"


def test_every_problem_at_once():
    dora = memory_checkpoint(lora_config(use_dora=True), lora_tensors() | {f"{P}{Q0}.lora_magnitude_vector": (HIDDEN,)})
    tensors = lora_tensors()
    tensors.pop(f"{P}{Q0}.lora_B.weight")
    tensors[f"{P}{attention()[1]}.lora_A.weight"] = (2, HIDDEN + 1)
    tensors[f"{P}elsewhere.lora_A.weight"] = (2, HIDDEN)
    tensors[f"{P}elsewhere.lora_B.weight"] = (HIDDEN, 2)
    tensors[f"{P}model.norm.weight"] = (HIDDEN,)
    broken = memory_checkpoint(lora_config(init_lora_weights="pissa_niter_4", layer_replication=[[0, 2]]), tensors)
    other = memory_checkpoint({"peft_type": "IA3"}, {f"{P}x.ia3_l": (3, 1)})
    plan = plan_stack(
        BASE, [member("a@1", 1.0, dora), member("b@1", 1.0, broken, fingerprint="sha256:0"), member("c@1", 1.0, other)]
    )
    assert set(codes(plan)) >= {
        "use_dora", "changed_base", "layer_replication", "missing_tensors", "shape", "unknown_modules",
        "extra_tensors", "other_base", "not_lora",
    }  # fmt: skip
    with pytest.raises(Incompatible) as caught:
        plan.check()
    assert caught.value.exit_code == 4
    assert all(p.message in caught.value.message for p in plan.errors)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True), ("lora_bias", True), ("layer_replication", [[0, 2]]),
        ("alora_invocation_tokens", [5]), ("use_qalora", True), ("use_bdlora", {"nblocks": 2}), ("arrow_config",
        {"top_k": 2}),
        ("kasa_config", {"x": 1}), ("monteclora_config", {"x": 1}),
    ],
)  # fmt: skip
def test_what_cannot_be_summed_is_refused_by_name(key, value):
    plan = planned(lora_config(**{key: value}))
    assert key in codes(plan, "error")
    assert "style@1" in next(p.message for p in plan.problems if p.code == key)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_adapters_that_changed_their_base_are_refused(init):
    assert codes(planned(lora_config(init_lora_weights=init))) == ["changed_base"]


def test_what_loftq_did_is_not_undone_by_what_pefts_conversion_does():
    hint = planned(lora_config(init_lora_weights="loftq")).problems[0].hint
    assert hint is not None and "path_initial_model" not in hint and "as LoftQ left it" in hint


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica"])
def test_other_beginnings_are_fine(init):
    assert not planned(lora_config(init_lora_weights=init)).problems


@pytest.mark.parametrize("init", ["wonder", "pisa", {"x": 1}, 7])
def test_a_beginning_from_the_future_may_have_changed_its_base(init):
    assert codes(planned(lora_config(init_lora_weights=init))) == ["unknown_init"]


def test_an_option_from_the_future_is_refused_and_one_that_is_off_is_not():
    assert codes(planned(lora_config(use_new_thing=True))) == ["unknown_key"]
    for off in (None, False, [], {}, ""):
        assert not planned(lora_config(use_new_thing=off)).problems


def test_other_types_of_peft():
    assert codes(planned({"peft_type": "VERA"}, {f"{P}x": (1,)})) == ["not_lora"]


def test_missing_tensors():
    tensors = lora_tensors()
    tensors.pop(f"{P}{Q0}.lora_A.weight")
    assert codes(planned(tensors=tensors)) == ["missing_tensors"]
    assert codes(planned(tensors=lora_tensors(attention()[1:]))) == ["missing_tensors"]
    assert codes(planned(tensors={})) == ["missing_tensors", "no_tensors"]


def test_a_missing_factor_is_told_apart_from_a_missing_module():
    tensors = lora_tensors()
    tensors.pop(f"{P}{Q0}.lora_A.weight")
    assert Q0 in planned(tensors=tensors).problems[0].message


@pytest.mark.parametrize(
    "name",
    [
        f"{P}model.norm.weight", f"{P}model.norm.bias", f"{P}{Q0}.lora_C.weight", f"{P}{Q0}.lora_B.bias", "x",
        f"{P}{Q0}.lora_magnitude_vector", f"{P}model.embed_tokens.scale", f"{P}{Q0}.lora_E",
        f"{P}{Q0}.lora_A.a.b.weight",
    ],
)  # fmt: skip
def test_extra_tensors(name):
    assert codes(planned(tensors=lora_tensors() | {name: (HIDDEN,)})) == ["extra_tensors"]


def test_an_embedding_that_nothing_targets_is_taken_whole():
    """PEFT loads it, and saves it without being told to; of another shape it fits nowhere."""
    plan = planned(tensors=lora_tensors() | {f"{P}lm_head.weight": (32, HIDDEN)})
    assert not plan.problems
    assert [replacement.parameter for replacement in plan.replacements] == ["lm_head.weight"]
    assert codes(planned(tensors=lora_tensors() | {f"{P}lm_head.weight": (36, HIDDEN)})) == ["rows"]
    assert codes(planned(tensors=lora_tensors() | {f"{P}lm_head.weight": (HIDDEN,)})) == ["shape"]


def test_an_adapter_of_that_very_base_is_not_sent_to_its_base():
    tensors = {name.replace("q_proj", "wq"): shape for name, shape in lora_tensors().items()}
    elsewhere = planned(lora_config(base_model_name_or_path="org/other"), tensors=tensors).problems[0]
    assert "use it on the base it was trained on" in elsewhere.hint
    own = planned(lora_config(base_model_name_or_path="tiny"), tensors=tensors).problems[0]
    assert "use it on the base" not in own.hint
    assert "another class or revision" in own.hint


def test_whole_modules_that_are_missing():
    """Those that the base has: a name that fits nothing there saves nothing."""
    assert codes(planned(lora_config(modules_to_save=["lm_head"]))) == ["missing_tensors"]
    assert not planned(lora_config(modules_to_save=["classifier"])).problems
    there = lora_tensors() | {f"{P}lm_head.weight": (32, HIDDEN)}
    assert not planned(lora_config(modules_to_save=["lm_head"]), there).problems


def test_tensors_for_modules_that_are_not_targeted():
    tensors = lora_tensors([*attention(), "model.layers.0.mlp.up_proj"])
    assert codes(planned(tensors=tensors)) == ["extra_tensors"]
    assert codes(planned(lora_config(layers_to_transform=[0]))) == ["extra_tensors"]


@pytest.mark.parametrize("targets", [None, []])
def test_a_configuration_without_targets_is_refused_by_what_is_missing(targets):
    """PEFT takes its own choice for the architecture, and drops the tensors of all other modules."""
    plan = planned(lora_config(target_modules=targets))
    assert codes(plan, "error") == ["no_targets"]
    assert '"target_modules": ["q_proj", "v_proj"]' in plan.errors[0].hint


def test_a_copy_of_the_base_weight_is_neither_extra_nor_a_replacement():
    tensors = lora_tensors([*attention(), "model.embed_tokens", "lm_head"]) | {
        f"{P}model.embed_tokens.base_layer.weight": (32, HIDDEN),
        f"{P}lm_head.base_layer.weight": (32, HIDDEN),
        f"{P}lm_head.base_layer.bias": (32,),
    }
    plan = planned(lora_config(target_modules=["q_proj", "v_proj", "embed_tokens", "lm_head"]), tensors)
    assert not plan.problems
    assert not plan.replacements
    assert plan.modules["model.embed_tokens"].shape == (32, HIDDEN)


@pytest.mark.parametrize("shape", [(2, HIDDEN + 1), (HIDDEN, 2), (2,), (), (2, HIDDEN, 1), (3, HIDDEN), (0, HIDDEN)])
def test_misshapen_factors(shape):
    plan = planned(tensors=lora_tensors() | {f"{P}{Q0}.lora_A.weight": shape})
    assert set(codes(plan)) <= {"shape", "rank", "empty_tensors"}
    assert plan.errors
    assert isinstance(plan.members[0].rank, int)


def test_a_rank_that_is_not_the_configurations():
    assert codes(planned(lora_config(r=4))) == ["rank"]
    assert codes(planned(lora_config(rank_pattern={"q_proj": 3}))) == ["rank"]


def test_a_linear_lora_on_an_embedding():
    name = "model.embed_tokens"
    tensors = {f"{P}{name}.lora_A.weight": (2, HIDDEN), f"{P}{name}.lora_B.weight": (32, 2)}
    assert codes(planned(lora_config(target_modules=["embed_tokens"]), tensors)) == ["shape"]


def test_numbers_that_are_no_weights():
    name = f"{P}{Q0}.lora_A.weight"
    assert codes(planned(dtypes={name: "I64"})) == ["dtype"]
    assert not planned(dtypes={name: "BF16"}).problems


def test_without_a_base_factors_are_held_against_each_other():
    assert not planned(base=None).problems
    assert codes(planned(base=None, tensors=lora_tensors() | {f"{P}{Q0}.lora_A.weight": (3, HIDDEN)})) == ["shape"]
    assert codes(planned(base=None, tensors=lora_tensors() | {f"{P}{Q0}.lora_A.weight": ()})) == ["shape"]
    embedding = planned(lora_config(target_modules=["embed_tokens"]), lora_tensors(["model.embed_tokens"]), base=None)
    assert embedding.modules["model.embed_tokens"].shape == (32, HIDDEN)


def test_names_that_no_module_has_cannot_break_the_plan():
    tensors = {}
    for name in ("²", "9" * 5000, "a.٣.b", "..", "model.layers.²"):
        tensors |= {f"{P}{name}.lora_A.weight": (2, HIDDEN), f"{P}{name}.lora_B.weight": (HIDDEN, 2)}
    assert "unknown_modules" in codes(planned(tensors=lora_tensors() | tensors))
    assert planned(tensors=tensors, base=None).modules


def test_the_same_adapter_twice():
    assert codes(plan_stack(BASE, [member("a@1"), member("a@2")])) == ["same_adapter_twice"]


def test_unlike_bases():
    plan = plan_stack(BASE, [member("a@1"), member("b@1", base="other", fingerprint="sha256:1")])
    assert codes(plan, "error") == ["unlike_bases"]
    assert "a@1 on tiny" in plan.problems[0].message
    assert "b@1 on other" in plan.problems[0].message


def test_another_model_under_the_same_name():
    assert codes(plan_stack(BASE, [member("a@1", fingerprint="sha256:1"), member("b@1")])) == ["other_base"]


def test_whole_modules():
    dense = lora_tensors() | {f"{P}lm_head.weight": (32, HIDDEN), f"{P}lm_head.bias": (32,)}
    saving = memory_checkpoint(lora_config(modules_to_save=["lm_head"]), dense)
    one = plan_stack(BASE, [member("a@1", checkpoint=saving), member("b@1")])
    assert not one.problems
    assert {r.parameter for r in one.replacements} == {"lm_head.weight", "lm_head.bias"}
    two = plan_stack(BASE, [member("a@1", checkpoint=saving), member("b@1", checkpoint=saving)])
    assert codes(two, "error") == ["modules_to_save"]
    assert "a@1 and b@1" in two.problems[0].message
    other = memory_checkpoint(
        lora_config(modules_to_save=["embed_tokens"]), lora_tensors() | {f"{P}model.embed_tokens.weight": (32, HIDDEN)}
    )
    apart = plan_stack(BASE, [member("a@1", checkpoint=saving), member("b@1", checkpoint=other)])
    assert codes(apart, "error") == ["modules_to_save"], "not even when they are different modules"
    assert codes(plan_stack(BASE, [member("a@1", 0.5, saving)])) == ["not_weighable"]
    assert not plan_stack(BASE, [member("a@1", 0.0, saving), member("b@1", 1.0, saving)]).problems


def test_trained_biases():
    biased = memory_checkpoint(lora_config(bias="lora_only"), lora_tensors() | {f"{P}{Q0}.base_layer.bias": (HIDDEN,)})
    plan = plan_stack(BASE, [member("a@1", checkpoint=biased)])
    assert [r.parameter for r in plan.replacements] == [f"{Q0}.bias"]
    assert codes(plan_stack(BASE, [member("a@1", -1.0, biased)])) == ["not_weighable"]
    both = plan_stack(BASE, [member("a@1", checkpoint=biased), member("b@1", checkpoint=biased)])
    assert codes(both) == ["modules_to_save"]


@pytest.mark.parametrize(
    ("present", "warned"),
    [
        ([("style@1", 1.0)], False), ([("style@2", 1.0)], True), ([("style@1", 0.5)], True), ([], True),
        ([("style@1", 0.0)], True), ([("other@1", 1.0)], True),
    ],
)  # fmt: skip
def test_a_missing_foundation_is_a_warning(present, warned):
    members = [*(member(label, weight) for label, weight in present), member("instruct@1", trained_on=("style@1",))]
    plan = plan_stack(BASE, members)
    assert codes(plan, "error") == []
    assert codes(plan, "warning") == (["foundation"] if warned else [])
    assert plan.check() is plan


def test_a_foundation_with_its_weight():
    upper = member("instruct@1", trained_on=("style@1:0.5",))
    assert not plan_stack(BASE, [member("style@1", 0.5), upper]).problems
    plan = plan_stack(BASE, [member("style@1"), upper])
    assert codes(plan) == ["foundation"]
    assert "style@1:0.5+instruct@1" in plan.problems[0].hint


def test_foundations_may_stand_in_any_order():
    upper = member("c@1", trained_on=("a@1", "b@1"))
    assert not plan_stack(BASE, [upper, member("b@1"), member("a@1")]).problems


def test_a_damaged_member_is_a_failed_verification():
    from dataclasses import replace

    from stackctl.plan.stack_plan import Problem

    plan = replace(plan_stack(BASE, []), problems=(Problem("damaged", "x is damaged"),))
    with pytest.raises(VerificationFailed):
        plan.check()
    with pytest.raises(Incompatible):
        replace(plan, problems=(*plan.problems, Problem("shape", "y"))).check()


def test_a_problem_as_json():
    problem = planned(lora_config(r=4)).problems[0].json()
    assert problem.keys() == {"code", "severity", "member", "message", "hint"}
    assert problem["member"] == "style@1"


# -- experts of a mixture, which are one parameter ---------------------------------------------------------------------

EXPERTS = {
    "model.layers.{0-1}.self_attn.q_proj": ModuleShape(type="Linear", shape=[8, 8]),
    "model.layers.{0-1}.mlp.experts.gate_up_proj": ModuleShape(type="Experts", shape=[3, 12, 8]),
    "model.layers.{0-1}.mlp.experts.down_proj": ModuleShape(type="Experts", shape=[3, 8, 6]),
}


def with_experts(kind="Experts", **config):
    """The plan of a checkpoint of rank 2 on both parameters of two layers, with the names that PEFT's wrappers have."""
    shapes = {}
    for layer in range(2):
        held = f"{P}model.layers.{layer}.mlp.experts"
        shapes |= {f"{held}.base_layer.lora_A.weight": (6, 8), f"{held}.base_layer.lora_B.weight": (12, 6)}
        shapes |= {f"{held}.lora_A.weight": (6, 6), f"{held}.lora_B.weight": (8, 6)}
    names = ["experts.gate_up_proj", "experts.down_proj"]
    modules = {n: ModuleShape(type=kind, shape=s.shape) if "experts" in n else s for n, s in EXPERTS.items()}
    base = msgspec.structs.replace(BASE, modules=modules)
    return planned(lora_config(target_modules=None, target_parameters=names) | config, shapes, base)


def test_the_wrapper_within_is_the_parameter_that_the_module_declares_first():
    plan = with_experts()
    assert not plan.errors
    found = {name: (module.shape, module.experts, module.rank) for name, module in plan.modules.items()}
    assert found == {
        f"model.layers.{layer}.mlp.experts.{name}": (shape, 3, 2)
        for layer in range(2)
        for name, shape in (("gate_up_proj", (12, 8)), ("down_proj", (8, 6)))
    }


def test_a_rank_of_experts_is_that_of_each():
    assert "rank" in codes(with_experts(r=3), "error")


def test_experts_of_which_an_older_entry_tells_no_layout_are_refused_for_that():
    assert codes(with_experts("Parameter"), "error") == ["older_entry"]


def test_a_weight_that_layers_share_is_refused_for_that():
    shared = {name: ModuleShape(type="Shared", shape=shape.shape) for name, shape in BASE.modules.items()}
    assert "shared_modules" in codes(planned(base=msgspec.structs.replace(BASE, modules=shared)), "error")


def test_a_weight_by_layer_or_module_stands_in_place_of_the_weight():
    layers = {"model.layers.{0-1}": 0.5, Q0: -2.0, "model.layers.1.self_attn.v_proj": 0.0}
    plan = plan_stack(BASE, [member("style@1", 0.25, layer_weights=layers), member("instruct@1", 3.0)])
    assert not plan.problems
    scale = {name: [(f.member, f.weight) for f in module.factors] for name, module in plan.modules.items()}
    assert scale[Q0] == [(0, -2.0), (1, 3.0)]
    assert scale["model.layers.1.self_attn.q_proj"] == [(0, 0.5), (1, 3.0)]
    assert scale["model.layers.1.self_attn.v_proj"] == [(1, 3.0)]
    assert plan_stack(BASE, [member("style@1", 0.0, layer_weights={Q0: 1.0})]).rank == plan.members[0].rank
    assert list(plan_stack(BASE, [member("style@1", 0.0, layer_weights={Q0: 1.0})]).modules) == [Q0]


def test_weights_for_layers_that_are_not_there_are_refused():
    plan = plan_stack(BASE, [member("style@1", layer_weights={"model.layers.{0-9}": 0.5})])
    assert codes(plan, "error") == ["layer_weights"]
    assert "model.layers.2" in plan.errors[0].message
    assert "model.layers.1" not in plan.errors[0].message
    idle = plan_stack(BASE, [member("style@1", layer_weights={"lm_head": 0.5})])
    assert [p.severity for p in idle.problems] == ["warning"]
    whole = memory_checkpoint(
        lora_config(modules_to_save=["lm_head"]), lora_tensors() | {f"{P}lm_head.weight": (32, HIDDEN)}
    )
    refused = plan_stack(BASE, [member("style@1", 1.0, whole, layer_weights={Q0: 0.5})])
    assert codes(refused, "error") == ["not_weighable"]


def test_the_hint_where_a_foundation_is_another_version_is_the_command_that_moves_a_member():
    upper = member("instruct@1", trained_on=("style@1",), data="my chats.jsonl")
    told = "stackctl train instruct --on {} --from instruct@1 --data 'my chats.jsonl'; for what was trained, "
    for label, weight, on in (("style@2", 1.0, "style@2"), ("style@1", 0.5, "style@1:0.5")):
        (problem,) = plan_stack(BASE, [member(label, weight), upper]).problems
        assert told.format(on) + "compose style@1+instruct@1" in problem.hint
    (alone,) = plan_stack(BASE, [upper]).problems
    assert alone.hint == "for what was trained, compose style@1+instruct@1", "there is nothing to move it onto"
