"""Runs on answers: their reference is kept for runs that are the same and no others; resumed, in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from oracle import distance, factors_of, write_jsonl
from tiny_registry import interrupt, made_once

from stackctl.engine.training import reference
from stackctl.engine.training.reference import fallen

PAIRS = [
    {"prompt": f"Say {word}:", "chosen": f" {word}" * (n + 1), "rejected": f" no {word}, and nothing else"}
    for n, word in enumerate(f"{colour}{kind}" for kind in ("", "ish") for colour in ("red", "green", "blue", "black"))
] + [{"prompt": f"{n}?", "chosen": "x" * n, "rejected": "y" * (20 - n)} for n in range(1, 13)]
LABELLED = [
    {"prompt": p["prompt"], "completion": p[k], "label": k == "chosen"} for p in PAIRS for k in ("chosen", "rejected")
]
pytestmark = pytest.mark.usefixtures("empty_token_cache")

RUN = ("--dtype", "float32", "--learning-rate", 0.01, "--batch-size", 4)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", PAIRS)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers the reference was computed of, run by run of the model."""
    found: list[int] = []
    own = reference.ReferenceModel._compute

    def compute(self: Any, examples: Any) -> Any:
        found.append(len(examples))
        return own(self, examples)

    monkeypatch.setattr(reference.ReferenceModel, "_compute", compute)
    return found


def test_the_reference_is_kept_for_a_run_that_is_the_same(h: Any, data: Path, computed: list[int]) -> None:
    h.with_one()
    args = ("--on", "one", "--data", data, "--objective", "dpo", "--max-steps", 4, *RUN, "--json")
    first = h.run("train", "a", *args).json
    assert sum(computed) == 40
    computed.clear()
    second = h.run("train", "b", *args).json
    assert sum(computed) == 8  # what is looked at on every run
    assert first["loss"] == second["loss"] and first["margin"] == second["margin"]
    computed.clear()
    assert h.run("train", "c", *args, "--no-cache").json["loss"] == first["loss"]
    assert sum(computed) == 40


@pytest.mark.parametrize("change", ["data", "stack", "weight", "base alone", "precision"])
def test_another_run_has_another_reference(h: Any, data: Path, computed: list[int], change: str) -> None:
    common = {"--on": "one", "--data": data, "--objective": "dpo", "--max-steps": 1, "--dtype": "float32"}

    def train(name: str, **_: Any) -> None:
        h.run("train", name, *(word for pair in common.items() for word in pair if pair[1]))

    def make() -> None:
        h.train("one", "--max-steps", 1, "--dtype", "float32")
        train("a")

    made_once(h.folder, h.base.with_name("reference-registry"), make)
    computed.clear()
    if change == "data":
        write_jsonl(data, [*PAIRS[:-1], {**PAIRS[-1], "chosen": "z" * 12}])
    if change == "stack":
        h.train("one", "--max-steps", 2, "--dtype", "float32", "--learning-rate", 0.01)
    common |= {"weight": {"--on": "one:0.5"}, "base alone": {"--on": ""}, "precision": {"--dtype": "bfloat16"}}.get(
        change, {}
    )
    train("b")
    assert sum(computed) == 40


def test_a_damaged_reference_is_computed_again(
    h: Any, data: Path, computed: list[int], empty_token_cache: Path
) -> None:
    args = ("--data", data, "--objective", "dpo", "--max-steps", 2, *RUN, "--json")
    first = h.run("train", "a", *args).json
    (file,) = empty_token_cache.rglob("log_probabilities.npy")
    for damage in (b"", file.read_bytes()[:-8], bytes(len(file.read_bytes()))):
        file.write_bytes(damage)
        computed.clear()
        assert h.run("train", "b", *args).json["loss"] == first["loss"]
        assert sum(computed) == 40


@pytest.mark.parametrize(
    ("objective", "dtype"), [("dpo", "float32"), ("dpo", "bfloat16"), ("kto", "bfloat16"), ("simpo", "float32")]
)
def test_a_resumed_run_on_answers_is_the_uninterrupted_one(
    h: Any, data: Path, objective: str, dtype: str, tmp_path: Path
) -> None:
    h.with_one()
    held_out = write_jsonl(tmp_path / "held.jsonl", PAIRS[:3])
    args = (
        "--on", "one", "--data", data, "--objective", objective, *RUN, "--dtype", dtype, "--max-steps", 4,
        "--save-steps", 2, "--gradient-accumulation", 2, "--eval-data", held_out, "--eval-steps", 3, "--dropout", 0.3,
    )  # fmt: skip
    whole = h.run("train", "whole", *args, "--json").json
    h.at_step(3, interrupt)
    h.run("train", "new", *args, code=130)
    h.at_step(0, interrupt)
    resumed = h.run("train", "new", *args, "--resume", "--json").json
    numbers = ("loss", "tokens", "accuracy", "margin", "eval_loss", "eval_accuracy", "eval_margin", "kept_step")
    assert {key: resumed[key] for key in numbers} == {key: whole[key] for key in numbers}
    assert h.log("new") == h.log("whole")
    assert resumed["digest"] == whole["digest"]


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_two_processes_have_the_numbers_of_one(h: Any, tmp_path: Path, objective: str) -> None:
    data = write_jsonl(tmp_path / "answers.jsonl", (LABELLED if objective == "kto" else PAIRS)[:13])
    held_out = write_jsonl(tmp_path / "held.jsonl", (LABELLED if objective == "kto" else PAIRS)[:3])
    args = (
        "--data", data, "--objective", objective, "--dtype", "float32", "--learning-rate", 0.001, "--epochs", 2,
        "--eval-data", held_out, "--json",
    )  # fmt: skip
    one = h.run("train", "one", *args, "--batch-size", 4).json
    two = h.run("train", "two", *args, "--batch-size", 2, "--num-processes", 2).json
    assert (two["processes"], two["steps"], two["tokens"]) == (2, one["steps"], one["tokens"])
    for key in ("loss", "margin", "eval_loss", "eval_margin"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
    assert two["eval_accuracy"] == one["eval_accuracy"]
    assert distance(factors_of(Path(two["path"])), factors_of(Path(one["path"]))) < 1e-3


def test_a_recipe_says_the_objective(h: Any, data: Path, tmp_path: Path) -> None:
    recipe = (
        "base: tiny\ntrain:\n  taste: {data: pairs.jsonl, objective: dpo, beta: 0.3, sft_weight: 0.1, max_steps: 2}\n"
    )
    (tmp_path / "stackctl.yaml").write_text(recipe)
    (done,) = h.run("train", "--json").json["built"]
    assert (done["objective"], done["beta"]) == ("dpo", 0.3)
    assert "up to date" in h.run("train").out
    (tmp_path / "stackctl.yaml").write_text(recipe.replace("dpo", "ipo"))
    (step,) = h.run("train", "--dry-run", "--json").json["plan"]
    assert "objective" in step["why"]


def test_a_dry_run_shows_both_answers(h: Any, data: Path) -> None:
    ran = h.run("train", "x", "--data", data, "--objective", "dpo", "--dry-run", "--json")
    assert [(piece["text"], piece["supervised"]) for piece in ran.json["preview"]] == [
        ("Say red:", False), (" red<|im_end|>", True), (" no red, and nothing else<|im_end|>", True),
    ]  # fmt: skip
    assert ran.err.count("Say red:") == 1 and "and what is rejected, behind the same beginning" in ran.err


def test_that_both_kinds_of_answers_became_less_likely_is_said() -> None:
    said = fallen({True: -1.5, False: -3.25}, "dpo")
    assert said and "1.5 nats" in said and "3.25" in said and "--sft-weight" in said
    assert "--sft-weight" not in str(fallen({True: -1.5, False: -3.25}, "kto")), "it is refused there"
    assert fallen({True: 0.1, False: -3}, "dpo") is None
    assert fallen({True: -1.0}, "dpo") is None


def test_a_run_that_makes_both_less_likely_says_so(h: Any, tmp_path: Path) -> None:
    """One answer is desired, and the same one behind other prompts is to be avoided: it goes down everywhere."""
    same = [{"prompt": f"{n}:", "completion": "so it goes", "label": n == 5} for n in range(9)]
    data = write_jsonl(tmp_path / "same.jsonl", same)
    args = ("--data", data, "--objective", "kto", "--dtype", "float32", "--learning-rate", 0.01, "--max-steps", 5)
    assert "became less likely" in h.run("train", "x", *args, "--batch-size", 9).err
