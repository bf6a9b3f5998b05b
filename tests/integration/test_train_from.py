"""``train --from``: a training begins exactly where another adapter stands, against raw PEFT with that one live."""

from __future__ import annotations

import json
from typing import Any

import oracle
import pytest
import torch
from oracle import factors_of
from safetensors.torch import load_file
from tiny_registry import CHAT, TEXTS

STILL = ("--max-steps", 1, "--learning-rate", 1e-30)


def begin(h: Any, name: str, *options: object, **kind: Any) -> Any:
    """A training without the defaults of rank and alpha that other tests have."""
    on = ["--on", kind["on"]] if "on" in kind else []
    data = h.data(kind.get("records", CHAT), f"{name}.jsonl")
    ran = h.run("train", name, *on, "--data", data, "--batch-size", 16, *options, "--json", code=kind.get("code", 0))
    return ran.json


CONFIGS = {
    "plain": {"r": 6, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 6, "lora_alpha": 9, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"q_proj": 3.5}},
    "regex": {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize(("case", "frozen"), [("plain", "fold"), *((case, "live") for case in CONFIGS)])
def test_the_first_step_is_taken_with_it_active(h: Any, case: str, frozen: str) -> None:
    h.add("style", seed=1)
    h.add("chat", seed=2, **CONFIGS[case])
    report = begin(h, "more", "--from", "chat", "--frozen", frozen, *STILL, on="style")
    live = oracle.live(h.base, *h.members(("style", 1), ("chat", 1)))
    assert h.log("more")[0]["loss"] == pytest.approx(oracle.loss(live, CHAT), rel=1e-5)
    assert report["from"] == "chat@1"
    entry = h.run("inspect", "more", "--json").json
    assert entry["from"] == "chat@1"
    old = load_file(h.paths["chat"] / "adapter_model.safetensors")
    new = load_file(h.weights("more") / "adapter_model.safetensors")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old), "not a bit was lost on the way"


@pytest.mark.parametrize("rslora", [False, True])
def test_a_higher_rank_begins_with_no_effect(tiny_registry: Any, rslora: bool) -> None:
    h = tiny_registry("tied")
    h.add("chat", seed=2, r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "embed_tokens"])
    alone = oracle.loss(oracle.live(h.base, *h.members(("chat", 1))), CHAT)
    begin(h, "more", "--from", "chat", "--rank", 10, *STILL)
    begin(h, "louder", "--from", "chat", "--rank", 10, "--alpha", 50, *STILL)
    for name in ("more", "louder"):
        assert h.log(name)[0]["loss"] == pytest.approx(alone, rel=1e-5)
        factors = load_file(h.weights(name) / "adapter_model.safetensors")
        for key, tensor in factors.items():
            if "lora_A" in key or "embedding_A" in key:
                assert tensor.shape[0] == 10
                assert tensor[4:].norm() > 0.1, "new directions can be learned"
            elif "lora_B" in key or "embedding_B" in key:
                assert tensor[:, 4:].abs().max() < 1e-20
    settings = h.run("inspect", "more", "--json").json["settings"]
    assert settings["rank"] == 10
    assert settings["alpha"] == pytest.approx(6 * (2.5**0.5 if rslora else 2.5))


def test_a_next_version_goes_on_where_the_last_one_stopped(h: Any) -> None:
    h.train("style", "--rank", 5, "--max-steps", 4, records=TEXTS)
    h.paths["style"] = h.weights("style")
    reached = oracle.loss(oracle.live(h.base, *h.members(("style", 1))), TEXTS)
    report = begin(h, "style", "--from", "style", "--max-steps", 4, "--base", "tiny", records=TEXTS)
    assert (report["version"], report["from"]) == (2, "style@1")
    log = [json.loads(line) for line in (h.weights("style", 2) / "training_log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(reached, rel=1e-5)
    assert log[-1]["loss"] < log[0]["loss"]
    assert factors_of(h.weights("style", 2)).keys() == factors_of(h.weights("style")).keys()


def test_moving_to_a_new_version_underneath(h: Any) -> None:
    h.train("style", "--max-steps", 2, records=TEXTS)
    h.train("instruct", "--max-steps", 2, on="style")
    h.train("style", "--max-steps", 4, records=TEXTS)
    moved = begin(h, "instruct", "--from", "instruct@1", "--max-steps", 2, on="style@2")
    assert (moved["version"], moved["on"], moved["from"]) == (2, ["style@2"], "instruct@1")


def test_what_cannot_be_begun_at_is_refused(h: Any) -> None:
    h.add("style", seed=1)
    h.add("whole", seed=2, modules_to_save=["lm_head"])
    h.add("dora", seed=3, r=4)
    h.add("silent", seed=4, lora_alpha=0)
    h.add("partly", seed=5, alpha_pattern={"q_proj": 0})
    h.train("instruct", "--max-steps", 1, on="style")
    cases = [
        ("more", ("--from", "nothing"), None, 3, "nothing"),
        ("more", ("--from", "style+dora"), None, 2, "not a single adapter"),
        ("more", ("--from", "style:0.5"), None, 2, "not a single adapter"),
        ("more", ("--from", "base"), None, 2, "not a single adapter"),
        ("more", ("--from", ""), None, 2, "is empty"),
        ("more", ("--on", ""), None, 2, "is empty"),
        ("more", ("--from", "silent"), None, 4, "alpha is 0"),
        ("more", ("--from", "partly"), None, 4, "alpha is 0"),
        ("more", ("--from", "style"), "style", 2, "stand on itself"),
        ("style", ("--from", "instruct"), None, 2, "stand on itself"),
        ("more", ("--from", "whole"), None, 4, "lm_head"),
        ("more", ("--from", "style", "--rank", 2), None, 2, "only be raised"),
        ("more", ("--from", "style", "--target-modules", "q_proj"), None, 4, "other modules"),
        ("more", ("--from", "dora", "--orthogonal"), "style", 2, "--orthogonal"),
    ]
    for name, options, on, code, said in cases:
        error = begin(h, name, *options, code=code, **({"on": on} if on else {}))["error"]
        assert said in error["message"], options
    every = ("--from", "style", "--rank", 2, "--orthogonal", "--target-modules", "q_proj")
    error = begin(h, "more", *every, on="style", code=2)["error"]
    for said in ("stand on itself", "only be raised", "--orthogonal", "other modules"):
        assert said in error["message"], "all at once"
    assert h.adapters() == {"style", "whole", "dora", "silent", "partly", "instruct"}


def test_recipes_begin_at_versions(h: Any) -> None:
    h.data(TEXTS, "texts.jsonl")
    recipe = h.folder / "stackctl.yaml"
    plain = "rank: 4, data: texts.jsonl, max_steps: 2"
    recipe.write_text(f"base: tiny\ntrain:\n  style: {{{plain}}}\n")
    h.run("train")
    recipe.write_text("base: tiny\ntrain:\n  style: {from: style@1, data: texts.jsonl, max_steps: 3}\n")
    [built] = h.run("train", "--json").json["built"]
    assert (built["version"], built["from"]) == (2, "style@1")
    assert h.run("train", "--json").json["built"] == [], "up to date"
    recipe.write_text("base: tiny\ntrain:\n  style: {from: style, data: texts.jsonl}\n")
    assert "circle" in h.run("train", "--json", code=2).json["error"]["message"]
    recipe.write_text(
        f"base: tiny\ntrain:\n  next: {{from: first, data: texts.jsonl, max_steps: 1}}\n  first: {{{plain}}}\n"
    )
    names = [b["adapter"] for b in h.run("train", "--json").json["built"]]
    assert names == ["first", "next"]


def test_a_run_resumed_elsewhere_is_another(tiny_registry: Any) -> None:
    from tiny_registry import interrupt

    h = tiny_registry()
    h.add("a", seed=1)
    h.add("b", seed=2)
    options = ("--max-steps", 6, "--save-steps", 2)
    whole = begin(h, "whole", "--from", "a", *options)
    h.at_step(3, interrupt)
    begin(h, "new", "--from", "a", *options, code=130)
    assert "from" in begin(h, "new", "--from", "b", *options, "--resume", code=2)["error"]["message"]
    h.at_step(0, interrupt)
    resumed = begin(h, "new", "--from", "a", *options, "--resume")
    assert resumed["loss"] == whole["loss"]
