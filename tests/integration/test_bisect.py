"""bisect: a module that was blown up is found wherever it stands; what is reported was tried."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stackctl.plan.bisection import StackPart, find_culprits, parts_of, switch_off
from stackctl.plan.stack_plan import StackPlan

MODULES = 14
"""Linear layers of the tiny Llama: two layers of seven."""


def blow_up(plan: StackPlan, part: StackPart, times: float) -> StackPlan:
    """The plan with one member's change of one module so many times as large."""
    module = plan.modules[part.module]
    factors = tuple(
        replace(factor, scaling=factor.scaling * times) if factor.member == part.member else factor
        for factor in module.factors
    )
    return replace(plan, modules={**plan.modules, part.module: replace(module, factors=factors)})


def damage(h: Any, name: str, *modules: str, times: float, factors: str = "B") -> None:
    """Register an adapter again with the factors of some modules so many times as large."""
    path = h.paths[name] / "adapter_model.safetensors"
    tensors = load_file(path)
    hit = [key for key in tensors if any(f".{module}.lora_{f}" in key for module in modules for f in factors)]
    assert len(hit) == len(modules) * len(factors)
    save_file({k: t * times if k in hit else t for k, t in tensors.items()}, path, {"format": "pt"})
    h.run("add", name, h.paths[name])


@pytest.fixture
def three(h: Any) -> Any:
    h.add("style", seed=1, scale=0.05)
    h.add("tone", seed=2, r=3, scale=0.05)
    h.add("odd", seed=3, scale=0.05, target_modules=["q_proj", "down_proj"])
    return h


@pytest.mark.parametrize(("expression", "by"), [("style", "text"), ("style+tone:0.5+odd", "loss")])
def test_a_planted_culprit_is_found_at_every_place(three: Any, expression: str, by: str) -> None:
    """Wherever it shows: on a random model a large change may do nothing, and another one undo it."""
    from stackctl.engine.data.examples import EncodeOptions
    from stackctl.engine.evaluation.probes import LossProbe, TextProbe
    from stackctl.engine.evaluation.scoring import tokenise_for
    from stackctl.engine.generation import Sampling, generate
    from stackctl.engine.records.prompt_files import Prompt
    from stackctl.engine.records.read import read_records

    stacked, whole = three.load(), three.plan(expression)
    data = tokenise_for(stacked, read_records(str(three.data())), "data", EncodeOptions(512), lambda _: None)
    prompt, sampling = Prompt("What is the sea?"), Sampling(8)
    parts, bound = parts_of(whole), math.ceil(math.log2(MODULES)) + len(whole.members)
    assert len(parts) == {"style": 14, "style+tone:0.5+odd": 32}[expression]
    shown, within = 0, 0
    for planted in parts:
        plan = blow_up(whole, planted, 1000.0)
        if by == "loss":
            probe: Any = LossProbe(stacked, plan, [data])
        else:
            stacked.use(plan)
            (answer,) = generate(stacked, [prompt], sampling)
            probe = TextProbe(stacked, plan, prompt, answer.text[:4], sampling)
            if probe.describe(frozenset(parts))["bad"]:
                continue
        stack, least = probe.score(frozenset()), probe.score(frozenset(parts))
        alone = probe.score(frozenset({planted}))
        if stack - alone < 0.05:
            continue  # it does not show
        found = find_culprits(parts, probe)
        if found.parts != (planted,):  # then it is not the only one without which it goes away
            enough, others = (stack + min(least, alone)) / 2, set(parts) - {planted}
            assert any(probe.score(frozenset({part})) < enough for part in others), (planted, stack, least, alone)
            continue
        shown, within = shown + 1, within + (found.evaluations <= bound)
    assert shown >= 0.6 * len(parts) and within >= 0.9 * shown, (shown, within)


def test_the_culprit_is_named_and_what_is_without_it_can_be_typed(three: Any) -> None:
    damage(three, "tone", "layers.1.mlp.up_proj", times=1000.0)
    data = three.data()
    made = three.run("bisect", "style+tone+odd", "--data", data, "--json").json
    assert made["culprit"] == {
        "member": "tone@2",
        "layers": ["model.layers.1"],
        "module": "model.layers.1.mlp.up_proj",
        "modules": ["model.layers.1.mlp.up_proj"],
    }
    assert made["culprits"] == [made["culprit"]] and made["evaluations"] <= math.ceil(math.log2(MODULES)) + 3
    assert made["without"] == "style@1+odd@1" and made["results"]["stack"]["bad"]
    assert three.run("ls", "--json").json["stacks"] == [], "nothing is written"
    losses = [
        row["loss"] for row in three.run("eval", "style+tone+odd", "base", "--data", data, "--json").json["results"]
    ]
    assert [made["results"][what]["loss"] for what in ("stack", "base")] == pytest.approx(losses)
    made = three.run("bisect", "style+tone+odd", "--data", data, "--name", "mended", "--json").json
    assert made["without"] == "mended"
    found = three.run("eval", "mended", "--data", data, "--json").json["results"][0]["loss"]
    assert found == pytest.approx(made["results"]["without"]["loss"], abs=1e-6) and found < losses[0]
    members = three.run("inspect", "mended", "--json").json["members"]
    assert [m["layer_weights"] for m in members] == [{}, {"model.layers.1.mlp.up_proj": 0.0}, {}]
    plan = three.plan("style+tone+odd")
    assert three.plan("mended").modules == switch_off(plan, [StackPart(1, "model.layers.1.mlp.up_proj")]).modules
    shown = three.run("bisect", "style+tone+odd", "--data", data)
    assert "model.layers.1.mlp.up_proj" in shown.out and "style@1+odd@1" in shown.out
    assert three.run("bisect", "style+tone+odd", "--data", data, "-q").out.strip() == "style@1+odd@1"


def test_a_bad_text_in_an_answer(three: Any) -> None:
    damage(three, "style", "layers.0.self_attn.v_proj", times=1000.0)
    ask = ("-p", "What is the sea?", "--max-new-tokens", 16)
    answer = three.run("generate", "style+tone", *ask, "--json").json["text"]
    bad = answer[4:8]
    made = three.run("bisect", "style+tone", *ask, "--bad", bad, "--json").json
    assert made["culprit"]["module"] == "model.layers.0.self_attn.v_proj" and made["culprit"]["member"] == "style@2"
    assert made["results"]["stack"]["text"] == answer and bad not in made["results"]["without"]["text"]
    assert made["without"] == "tone@1" and bad not in three.run("generate", "tone@1", *ask, "--json").json["text"]
    raw = three.run("generate", "style+tone", *ask, "--raw", "--json").json["text"]
    made = three.run("bisect", "style+tone", *ask, "--raw", "--bad", raw[2:6], "--json").json
    assert made["culprit"]["module"] == "model.layers.0.self_attn.v_proj" and made["results"]["stack"]["text"] == raw


@pytest.mark.parametrize("way", ["data", "text"])
def test_a_culprit_whose_numbers_run_over(three: Any, way: str) -> None:
    damage(three, "tone", "layers.0.mlp.down_proj", times=1e22, factors="AB")
    how = ("--data", three.data()) if way == "data" else ("-p", "Hello", "--bad", "!!!", "--max-new-tokens", 9)
    made = three.run("bisect", "style+tone", *how, "--json").json
    assert made["culprit"]["module"] == "model.layers.0.mlp.down_proj" and made["without"] == "style@1"
    assert made["evaluations"] <= math.ceil(math.log2(MODULES)) + 2
    stack = made["results"]["stack"]
    assert stack["bad"] and (stack["loss"] is None if way == "data" else stack["finite"] is False)
    if way == "text":  # whatever text it was that somebody saw
        made = three.run("bisect", "style+tone", "-p", "Hello", "--bad", "no such text", "--json").json
        assert made["culprit"]["module"] == "model.layers.0.mlp.down_proj"


def test_a_member_alone_leaves_the_base(three: Any) -> None:
    damage(three, "odd", "layers.1.mlp.down_proj", times=1000.0)
    made = three.run("bisect", "odd", "--data", three.data(), "--json").json
    assert made["culprit"]["module"] == "model.layers.1.mlp.down_proj" and made["without"] == "base"
    assert made["evaluations"] <= math.ceil(math.log2(4)) + 1
    three.run("add", "single", three.paths["odd"])
    made = three.run("bisect", "odd", "--data", three.data(), "--name", "less", "--json").json
    assert made["without"] == "less" and len(three.plan("less").modules) == 3


def test_several_culprits_are_all_named(three: Any) -> None:
    damage(three, "style", "layers.0.mlp.up_proj", times=1000.0)
    damage(three, "tone", "layers.1.self_attn.o_proj", times=1000.0)
    made = three.run("bisect", "style+tone+odd", "--data", three.data(), "--json").json
    assert [(c["member"], c["module"]) for c in made["culprits"]] == [
        ("style@2", "model.layers.0.mlp.up_proj"),
        ("tone@2", "model.layers.1.self_attn.o_proj"),
    ]
    assert made["without"] == "odd@1" and not made["results"]["without"]["bad"]


def test_what_is_not_bad_or_bad_without_any_member_is_said(three: Any) -> None:
    ask = ("-p", "What is the sea?", "--max-new-tokens", 8)
    base = three.run("generate", "base", "--base", "tiny", *ask, "--json").json["text"]
    style = three.run("generate", "style", *ask, "--json").json["text"]
    assert "does not hold 'zebra'" in three.run("bisect", "style", *ask, "--bad", "zebra", code=1).err
    common = next(letter for letter in style if letter in base)
    assert "is already bad" in three.run("bisect", "style", *ask, "--bad", common, code=1).err
    three.train("good", "--epochs", 6, "--learning-rate", 0.02)
    assert "is not bad on these records" in three.run("bisect", "good", "--data", three.data(), code=1).err
    assert "nothing to switch off" in three.run("bisect", "style:0", "--data", three.data(), code=2).err


def test_weights_and_layers_of_a_stored_stack_are_kept(three: Any) -> None:
    damage(three, "style", "layers.1.mlp.gate_proj", times=1000.0)
    three.run("compose", "style:0.5+tone:-1", "--name", "s")
    made = three.run("bisect", "s", "--data", three.data(), "--name", "s2", "--json").json
    assert made["culprit"]["module"] == "model.layers.1.mlp.gate_proj"
    assert (
        three.plan("s2").modules == switch_off(three.plan("s"), [StackPart(0, "model.layers.1.mlp.gate_proj")]).modules
    )
    again = three.run("bisect", "s", "--data", three.data(), "--json").json
    assert again["without"] == "tone@1:-1"
    three.run("compose", "style+tone", "--method", "ties", "--name", "t")
    again = three.run("bisect", "t", "--data", three.data(), "--json").json
    assert again["without"] is None and again["culprit"]["member"] == "style@2"


def test_what_a_member_brings_whole_is_one_part(h: Any) -> None:
    h.add("style", seed=1, scale=0.05)
    h.add("saved", seed=2, scale=0.05, modules_to_save=["lm_head"], target_modules=["q_proj"])
    path = h.paths["saved"] / "adapter_model.safetensors"
    tensors = load_file(path)
    (head,) = [key for key in tensors if "lm_head" in key]
    save_file({**tensors, head: tensors[head] * 1000}, path, {"format": "pt"})
    h.run("add", "saved", h.paths["saved"])
    made = h.run("bisect", "style+saved", "--data", h.data(), "--name", "less", "--json").json
    assert made["culprit"]["member"] == "saved@2" and made["culprit"]["module"] is None
    plan = h.plan("less")
    assert not plan.replacements and plan.modules == switch_off(h.plan("style+saved"), [StackPart(1, "")]).modules


def test_bad_usage_is_said_at_once_before_the_base_is_loaded(three: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("stackctl.engine.models.load_base", load)
    data = three.data()
    cases: list[tuple[tuple[Any, ...], int, tuple[str, ...]]] = [
        (("style",), 2, ("what is bad",)),
        (("style", "-p", "x"), 2, ("--bad",)),
        (("style", "-p", "x", "--bad", " "), 2, ("--bad is empty",)),
        (("style", "-p", " ", "--bad", "x"), 2, ("prompt is empty",)),
        (("style", "--bad", "x", "--data", data), 2, ("--bad",)),
        (("style", "-p", "x", "--bad", "x", "--data", data), 2, ("-p and --data",)),
        (("style", "-p", "x", "--bad", "x", "--max-length", 8), 2, ("--max-length",)),
        (("style", "--raw", "--max-new-tokens", 3, "--data", data), 2, ("--raw", "--max-new-tokens")),
        (("stile", "--bad", "x"), 2, ("what is bad", "'stile'")),
        (("stile", "--data", data), 3, ("'stile'",)),
        (("style", "--data", "none.jsonl"), 3, ("none.jsonl",)),
        (("style", "--data", data, "--name", "tone"), 2, ("'tone'",)),
        (("base", "--base", "tiny", "--data", data), 2, ("nothing to switch off",)),
        (("style", "--data", three.data([{"text": ""}], "empty.jsonl")), 2, ("empty.jsonl",)),
    ]
    for arguments, code, said in cases:
        err = three.run("bisect", *arguments, code=code).err
        assert all(part in err for part in said), (arguments, err)
