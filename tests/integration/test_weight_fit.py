"""compose --fit: what is no better is not taken, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import yaml
from member_weights import check_live_weights
from safetensors.torch import load_file, save_file
from short_texts import texts


def test_a_stack_that_is_no_better_keeps_the_typed_weights(style_and_noise: Any) -> None:
    made = style_and_noise.run(
        "compose", "style:0.9", "--name", "s", "--fit", style_and_noise.data(texts(12, 16)), "--fit-steps", 5, "--json"
    ).json
    fit = made["fit"]
    assert fit["fitted"] is False, "with two records kept apart chance cannot be told"
    assert (fit["records"], fit["per"], fit["weights"]) == (2, "member", {"style": 0.9})
    assert fit["held_out_after"] == fit["held_out_before"] and fit["loss_after"] == fit["loss_before"]
    assert made["members"][0]["weight"] == 0.9
    assert style_and_noise.run("inspect", "s", "--json").json["members"][0]["weight"] == 0.9


def test_learned_weights_are_better_where_it_is_judged_and_are_what_is_written(style_and_noise: Any) -> None:
    data, held = style_and_noise.data(texts(12, 22)), style_and_noise.data(texts(22, 36), "held.jsonl")
    ask = ("--fit", data, "--holdout", held, "--fit-steps", 3, "--json")
    made = style_and_noise.run("compose", "style:0+noise", "--name", "s", *ask).json
    fit = made["fit"]
    assert fit["fitted"] is True and fit["records"] == 10 and fit["held_out_records"] == 14
    assert fit["held_out_after"] < fit["held_out_before"] and fit["loss_after"] < fit["loss_before"]
    assert {m["adapter"]: m["weight"] for m in made["members"]} == fit["weights"]
    losses = {
        what: style_and_noise.run("eval", what, "--data", held, "--json").json["results"][0]["loss"]
        for what in ("style:0+noise", "s")
    }
    assert losses["s"] == pytest.approx(fit["held_out_after"], abs=1e-6)
    assert losses["style:0+noise"] == pytest.approx(fit["held_out_before"], abs=1e-6)
    again = style_and_noise.run("compose", "style:0+noise", "--name", "s2", *ask).json["fit"]
    assert again == fit, "the same seed gives the same bits"
    turned = style_and_noise.run("compose", "noise+style:0", "--name", "s3", *ask).json["fit"]
    assert turned["tried"]["weights"] == fit["tried"]["weights"] and list(turned["weights"]) == ["noise", "style"]


@pytest.mark.parametrize("start", ["a:0+b", "a:0+b:0"])
def test_what_begins_at_zero_is_fitted_on_modules_of_its_own(h: Any, start: str) -> None:
    """Its factors were left out where no other member stood, and of nothing but zeros there was nothing to learn."""
    h.add("a", seed=1, target_modules=["down_proj", "q_proj"])
    h.add("b", seed=2, target_modules=["o_proj"])
    ask = ("--fit", h.data(texts(12, 22)), "--name", "s", "--fit-steps", 40, "--json")
    weights, other = (h.run("compose", what, *ask).json["fit"]["tried"]["weights"] for what in ("a+b", start))
    assert other == pytest.approx(weights, abs=1e-2) and abs(weights["a"]) > 0.02


def test_layers_and_modules_have_their_own_weights(style_and_noise: Any) -> None:
    data, held = style_and_noise.data(texts(12, 22)), style_and_noise.data(texts(22, 36), "held.jsonl")
    for per, names in (
        ("layer", {"model.layers.0", "model.layers.1"}),
        ("module", set(style_and_noise.plan("style").modules)),
    ):
        ask = ("--fit", data, "--holdout", held, "--per", per, "--fit-steps", 2, "--json")
        made = style_and_noise.run("compose", "style:0.2", "--name", f"by-{per}", *ask).json
        assert made["fit"]["fitted"] is True and made["fit"]["steps"] <= 2
        assert set(made["fit"]["weights"]["style"]) == names == set(made["members"][0]["layer_weights"])
        entry = yaml.safe_load((style_and_noise.folder / f"registry/stacks/by-{per}.yaml").read_text())
        assert entry["members"][0]["layer_weights"] == made["fit"]["weights"]["style"]


def test_what_cannot_be_fitted_is_said_before_the_base_is_loaded(
    style_and_noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("stackctl.engine.models.load_base", load)
    data = style_and_noise.data()
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        (("style+style", "--fit", data), 4, "style"),
        (("style", "--fit", data, "--method", "ties"), 2, "--fit"),
        (("style", "--fit", data, "--per", "head"), 2, "--per"),
        (("style", "--per", "layer"), 2, "--fit"),
        (("style", "--fit", "nothing.jsonl"), 3, "nothing.jsonl"),
        (("style", "--fit", style_and_noise.data([{"text": "one record"}], "one.jsonl")), 2, "--holdout"),
        (("style", "--fit", style_and_noise.data([{"text": ""}], "empty.jsonl")), 2, "empty.jsonl"),
        (("base", "--fit", data), 2, "base"),
    ]
    for arguments, code, said in cases:
        assert said in style_and_noise.run("compose", *arguments, "--name", "s", code=code).err
    assert style_and_noise.run("ls", "--json").json["stacks"] == []
    path = style_and_noise.weights("style") / "adapter_model.safetensors"
    style_and_noise.folder.joinpath("bad").mkdir()
    tensors = load_file(path)
    first = next(iter(tensors))
    save_file({**tensors, first: tensors[first] * float("nan")}, path, {"format": "pt"})
    assert style_and_noise.run("compose", "style", "--name", "s", "--fit", data, code=5).err


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "tied", "gemma"])
def test_weights_live_are_weights_folded(tiny_registry: Any, name: str) -> None:
    """With all that a LoRA stands on: embeddings, a head, transposed layers, experts."""
    h = tiny_registry(name)
    h.add_on_every_kind(name)
    smooth = name != "mixtral"  # whose router jumps
    check_live_weights(h, {"style": 0.3, "instruct": -1.2}, oracle.TOKENS, smooth=smooth)
