"""An adapter that begins on another stack or base than it stood on: how far it moved, against raw PEFT."""

from __future__ import annotations

import json
import shutil
from typing import Any

import oracle
import pytest
import torch
from oracle import factors_of
from safetensors.torch import load_file, save_file
from tiny_registry import CHAT, TEXTS, interrupt, made_once

MORE = TEXTS[:3]
STILL = ("--max-steps", 1, "--learning-rate", 1e-30)


@pytest.fixture
def moved(h: Any) -> Any:
    """style@1, instruct@1 on it, and style@2, which is another."""

    def make() -> None:
        h.train("style", "--max-steps", 15, "--learning-rate", 0.02, records=TEXTS)
        h.data(CHAT[:3], "heldout.jsonl")
        h.train("instruct", "--max-steps", 15, "--learning-rate", 0.02, "--eval-data", "heldout.jsonl", on="style")
        h.train("style", "--max-steps", 15, "--learning-rate", 0.02, "--seed", 5, records=MORE)

    made_once(h.folder, h.base.with_name("moved-registry"), make)
    for name, version in (("style", 1), ("style", 2), ("instruct", 1)):
        h.paths[f"{name}@{version}"] = h.weights(name, version)
    return h


def move(h: Any, *options: object, on: str = "style@2", code: int = 0) -> Any:
    data = h.data(CHAT)
    given = ("--on", on, "--from", "instruct@1", "--data", data, "--batch-size", 5)
    return h.run("train", "instruct", *given, *options, "--json", code=code)


def test_losses_and_divergence_are_those_of_raw_peft(moved: Any) -> None:
    h = moved
    ran = move(h, *STILL, "--eval-data", "heldout.jsonl")
    found, held = ran.json["moved"], CHAT[:3]
    old, new = (oracle.live(h.base, *h.members((style, 1), ("instruct@1", 1))) for style in ("style@1", "style@2"))
    assert (found["base"], found["trained_on"], found["records"]) == ("tiny", ["style@1"], 3)
    assert found["loss_before"] == pytest.approx(oracle.loss(old, held), rel=1e-4)
    assert found["loss_copy"] == pytest.approx(oracle.loss(new, held), rel=1e-4)
    divergence = 0.0
    for record in held:
        ids, supervised = oracle.label(record)
        with torch.no_grad():
            p, q = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (old, new))
        divergence += float((p.exp() * (p - q)).sum(-1)[:-1][torch.tensor(supervised[1:])].sum())
    assert found["divergence"] == pytest.approx(divergence / oracle.supervised_count(held), rel=1e-3)
    assert found["own_data"] is True
    assert found["mark"] == pytest.approx(h.run("inspect", "instruct@1", "--json").json["run"]["eval_loss"])
    entry = h.run("inspect", "instruct@2", "--json").json["moved"]
    assert f"loss {entry['loss_before']:.3f} before, {entry['loss_copy']:.3f}" in h.run("inspect", "instruct@2").out
    assert {k: v for k, v in found.items() if v is not None} == {k: v for k, v in entry.items() if v is not None}
    assert "instruct@1 stood on style@1: on 3 records its loss goes from" in ran.err


def test_the_better_of_copy_and_correction_is_begun_at(moved: Any) -> None:
    h = moved
    began = set()
    for number, more in enumerate(([], ["--eval-data", "heldout.jsonl"])):
        found = move(h, *STILL, *more).json["moved"]
        old, new = (factors_of(h.weights("instruct", version)) for version in (1, number + 2))
        began.add(found["corrected"])
        assert found["corrected"] is (found["loss_corrected"] < found["loss_copy"])
        for name, tensor in old.items():
            same = torch.equal(tensor, new[name])
            assert same if "lora_A" in name or not found["corrected"] else not same, name
        lower = min(found["loss_copy"], found["loss_corrected"])
        if more:  # what is judged is all that is held out
            evaluated = h.run("inspect", f"instruct@{number + 2}", "--json").json["run"]["eval_loss_before"]
            assert evaluated == pytest.approx(lower, rel=1e-4)
    assert True in began, "or none of this was looked at"


def test_what_is_beneath_may_also_be_more_or_gone(moved: Any) -> None:
    h = moved
    h.add("tone", seed=3)
    found = move(h, *STILL, on="style@1+tone").json["moved"]
    assert (found["trained_on"], found["loss_corrected"]) == (["style@1"], None), "what was added is not taken back"
    assert found["divergence"] > 0
    assert move(h, *STILL, on="style@1").json["moved"] is None, "it stands where it stood"
    h.run("rm", "instruct@3")
    for version in (2, 3):
        h.run("rm", f"instruct@{version}", code=None)
    entry = h.folder / "registry" / "adapters" / "instruct.yaml"
    entry.write_text(entry.read_text().replace("- style@1", "- style@7"))
    ran = move(h, *STILL)
    assert ran.json["moved"] is None
    assert "how far instruct@1 moved is not known: there is no style@7" in ran.err


def test_the_mark_is_told_when_it_is_reached_and_kept_over_a_resume(moved: Any) -> None:
    h = moved
    options = ("--eval-data", "heldout.jsonl", "--max-steps", 30, "--eval-steps", 2, "--learning-rate", 0.01,
               "--save-steps", 2, "--keep", "last")  # fmt: skip
    ran = move(h, *options)
    mark = ran.json["moved"]["mark"]
    points = {point["step"]: point["eval_loss"] for point in h.log_of("instruct", 2) if "eval_loss" in point}
    reached = next((step for step, loss in sorted(points.items()) if loss <= mark), None)
    assert ran.json["moved"]["reached_step"] == reached
    assert reached is not None
    assert f"step {reached}: as good as it was where it stood, {mark:.3f}" in ran.err
    h.run("rm", "instruct@2")
    h.at_step(5, interrupt)
    move(h, *options, code=130)
    h.at_step(0, interrupt)
    again = move(h, *options, "--resume").json
    drop = {"seconds"}
    assert {k: v for k, v in again["moved"].items() if k not in drop} == {
        k: v for k, v in ran.json["moved"].items() if k not in drop
    }
    assert again["digest"] == ran.json["digest"]


def test_the_mark_is_measured_where_the_entry_does_not_have_it(moved: Any) -> None:
    h = moved
    held = CHAT[3:]
    h.data(held, "others.jsonl")
    found = move(h, *STILL, "--eval-data", "others.jsonl").json["moved"]
    old = oracle.live(h.base, *h.members(("style@1", 1), ("instruct@1", 1)))
    assert found["mark"] == pytest.approx(oracle.loss(old, held), rel=1e-4)
    assert found["own_data"] is False
    assert move(h, *STILL).json["moved"]["mark"] is None


def test_a_new_revision_of_the_base(moved: Any, models: Any) -> None:
    h = moved
    tensors = load_file(h.base / "model.safetensors")
    revised = h.folder / "revised"
    shutil.copytree(h.base, revised)
    torch.manual_seed(3)
    save_file(
        {name: t + 0.02 * torch.randn_like(t) for name, t in tensors.items()},
        revised / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    settings = revised / "tokenizer_config.json"  # saved again by another program: other bytes, the same tokenizer
    settings.write_text(json.dumps(json.loads(settings.read_text()), indent=7))
    h.run("base", "add", "revised", revised)
    h.train("alone", "--base", "tiny", "--max-steps", 3)
    h.paths["alone"] = h.weights("alone")
    options = ("--base", "revised", "--from", "alone@1", "--data", h.data(CHAT), "--batch-size", 5)
    found = h.run("train", "alone", *options, *STILL, "--json").json
    assert (found["base"], found["from"], found["on"]) == ("revised", "alone@1", [])
    old, new = (oracle.live(base, *h.members(("alone", 1))) for base in (h.base, revised))
    said = found["moved"]
    judged = CHAT[: said["records"]] if said["records"] == len(CHAT) else CHAT[::2][: said["records"]]
    assert (said["base"], said["trained_on"]) == ("tiny", [])
    assert said["loss_before"] == pytest.approx(oracle.loss(old, judged), rel=1e-4)
    assert said["loss_copy"] == pytest.approx(oracle.loss(new, judged), rel=1e-4)
    h.run("base", "add", "other", models("gpt2"))
    error = h.run("train", "alone", "--base", "other", *options[2:], "--json", code=4).json["error"]
    assert "alone@1" in error["message"]
