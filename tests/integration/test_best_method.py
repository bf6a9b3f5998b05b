"""compose --method best: everything is judged on the same records, and only what is more than chance is taken."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import yaml
from short_texts import texts

from stackctl.plan.methods import METHODS, SUM, candidates, check_method


def test_every_method_is_among_the_candidates_with_settings_that_it_takes() -> None:
    found = candidates(members=3, rank=32, seed=7)
    assert {one.method for one in found} == set(METHODS) - {SUM}
    assert len({(one.method, one.options, one.scale) for one in found}) == len(found)
    for one in found:
        assert check_method(one.method, one.options) == one.options
    assert {one.scale for one in found if one.method == "ties"} == {1.0, 3.0}
    assert {one.scale for one in candidates(members=1, rank=8, seed=0)} == {1.0}


def test_the_best_is_written_and_is_what_eval_measures(style_and_noise: Any) -> None:
    data, held = style_and_noise.data(texts(12, 22)), style_and_noise.data(texts(22, 36), "held.jsonl")
    ask = ("--method", "best", "--data", data, "--holdout", held, "--fit-steps", 3, "--name", "s")
    made = style_and_noise.run("compose", "style:0.2+noise", *ask, "--json").json
    tried, best = made["tried"], made["best"]
    assert {row["method"] for row in tried} == set(METHODS)
    assert [row["fitted"] for row in tried[:2]] == [False, True] and tried[0]["weights"] == {"style": 0.2, "noise": 1.0}
    assert made["improved"] is True and best in tried and best["p_value_of_all"] <= 0.05
    assert best["loss"] == min(
        row["loss"] for row in tried if row["p_value_of_all"] is not None and row["p_value_of_all"] <= 0.05
    )
    assert best["loss"] < tried[0]["loss"] and best["difference"] == pytest.approx(best["loss"] - tried[0]["loss"])
    assert made["held_out_records"] == 14
    entry = yaml.safe_load((style_and_noise.folder / "registry/stacks/s.yaml").read_text())
    assert entry.get("method", SUM) == made["method"] == best["method"]
    assert {m["adapter"]: m["weight"] for m in made["members"]} == best["weights"]
    losses = {
        w: style_and_noise.run("eval", w, "--data", held, "--json").json["results"][0] for w in ("s", "style:0.2+noise")
    }
    for name, row in (("s", best), ("style:0.2+noise", tried[0])):
        assert losses[name]["loss"] == pytest.approx(row["loss"], abs=1e-5)
        assert losses[name]["standard_error"] == pytest.approx(row["standard_error"], abs=1e-5)
        assert [one["data"] for one in row["data"]] == [str(held)]
    for row in tried:  # what is no better on the records that are learned from is not in the running
        assert (row["p_value_of_all"] is not None) == (row["loss_learned"] < tried[0]["loss_learned"])
        assert row["p_value_of_all"] is None or row["p_value"] <= row["p_value_of_all"] + 0.02


def test_one_row_is_what_composing_by_hand_gives(style_and_noise: Any) -> None:
    data, held = style_and_noise.data(texts(12, 22)), style_and_noise.data(texts(22, 36), "held.jsonl")
    ask = ("--method", "best", "--data", data, "--holdout", held, "--fit-steps", 1, "--name", "s")
    tried = style_and_noise.run("compose", "style+noise:0.5", *ask, "--dry-run", "--json").json["tried"]
    assert style_and_noise.run("ls", "--json").json["stacks"] == []
    for number, row in enumerate(tried[2:]):
        options = [word for key, value in row["options"].items() if value is not None for word in (f"--{key}", value)]
        expression = "+".join(f"{name}:{weight}" for name, weight in row["weights"].items())
        style_and_noise.run("compose", expression, "--name", f"hand{number}", "--method", row["method"], *options)
    by_hand = [f"hand{number}" for number in range(len(tried) - 2)]
    found = style_and_noise.run("eval", *by_hand, "--data", held, "--json").json["results"]
    for row, one in zip(tried[2:], found, strict=True):
        assert one["loss"] == pytest.approx(row["loss"], abs=1e-5), row["settings"]


def test_what_chance_could_show_is_not_taken(style_and_noise: Any) -> None:
    ran = style_and_noise.run(
        "compose", "style:0.9+noise:0.1", "--name", "s", "--method", "best",
        "--data", style_and_noise.data(texts(12, 18)), "--fit-steps", 2,
    )  # fmt: skip
    assert "the typed sum is kept" in ran.err and "fewer than 6 held-out records" in ran.err
    assert "sum *" in ran.out and "core_ties" in ran.out
    shown = style_and_noise.run("inspect", "s", "--json").json
    assert shown["exact"] is True and [m["weight"] for m in shown["members"]] == [0.9, 0.1]


def test_many_candidates_are_many_chances() -> None:
    """Every flip of every record's sign, in plain Python."""
    from stackctl.engine.evaluation.significance import best_of_many_p, sign_flip_p

    gaps = [[0.3, 0.1, 0.2, 0.4, -0.1, 0.25], [0.1, -0.2, 0.3, 0.05, 0.0, 0.1], [-0.3, -0.2, -0.1, -0.4, -0.2, -0.1]]

    def size(signs: tuple[int, ...], own: list[float]) -> float:
        return abs(sum(s * g for s, g in zip(signs, own, strict=True))) / math.sqrt(sum(g * g for g in own))

    flips = list(itertools.product((1, -1), repeat=6))
    wanted = [
        sum(max(size(flip, one) for one in gaps) >= size((1,) * 6, own) - 1e-9 for flip in flips) / len(flips)
        for own in gaps
    ]
    assert best_of_many_p(gaps) == pytest.approx(wanted)
    assert best_of_many_p(gaps[:1]) == [sign_flip_p(gaps[0])]
    assert all(many >= sign_flip_p(own) for many, own in zip(best_of_many_p(gaps), gaps, strict=True))


def test_chance_alone_is_found_better_no_more_often_than_it_is_said() -> None:
    """Twenty candidates that are all noise, a thousand times over: the best of them passes in one of twenty."""
    import numpy as np

    from stackctl.engine.evaluation.significance import best_of_many_p

    random = np.random.default_rng(0)
    passed = sum(min(best_of_many_p(random.standard_normal((20, 10)))) <= 0.05 for _ in range(1000))
    assert 30 <= passed <= 70


def test_what_cannot_be_judged_is_said_before_the_base_is_loaded(
    style_and_noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("stackctl.engine.models.load_base", load)
    data, best = style_and_noise.data(), ("--method", "best")
    style_and_noise.add("whole", seed=3, modules_to_save=["lm_head"])
    cases: list[tuple[tuple[Any, ...], int, str]] = [
        (("style+noise", *best), 2, "--data"),
        (("style+style", *best, "--data", data), 4, "style"),
        (("style+noise", *best, "--data", data, "--density", "0.5"), 2, "--density"),
        (("style+noise", *best, "--data", data, "--fit", data), 2, "--fit"),
        (("style+noise", *best, "--data", data, "--sweep", "style=0:1:0.5"), 2, "--sweep"),
        (("style+noise", *best, "--data", "nothing.jsonl"), 3, "nothing.jsonl"),
        (("style+noise", *best, "--data", data, "--holdout", "none.jsonl"), 3, "none.jsonl"),
        (("style+noise", *best, "--data", style_and_noise.data([{"text": ""}], "empty.jsonl")), 2, "empty.jsonl"),
        (("style+whole", *best, "--data", data), 4, "whole"),
        (("base", *best, "--data", data), 2, "base"),
        (("style+noise", "--method", "bset"), 2, "best"),
        (("style+noise", "--data", data), 2, "--sweep"),
    ]
    for arguments, code, said in cases:
        assert said in style_and_noise.run("compose", *arguments, "--name", "s", code=code).err, arguments
    assert style_and_noise.run("ls", "--json").json["stacks"] == []


def test_what_takes_long_says_how_far_it_is_without_a_terminal(
    style_and_noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackctl.cli.progress._PATIENCE", 0.0)
    monkeypatch.setattr("stackctl.cli.progress._BETWEEN_LINES", 0.0)
    data, held = style_and_noise.data(texts(12, 22)), style_and_noise.data(texts(22, 36), "held.jsonl")
    ask = ("--method", "best", "--data", data, "--holdout", held, "--fit-steps", 3, "--dry-run")
    shown = style_and_noise.run("compose", "style:0.2+noise", *ask).err.splitlines()
    for what in ("learning weights", "trying methods"):
        shares = [int(line.partition(": ")[2].rstrip("%")) for line in shown if line.startswith(f"{what}: ")]
        assert shares and shares == sorted(shares) and len(set(shares)) > 2
    assert "evaluating: " in style_and_noise.run("eval", "style", "noise", "--data", held).err
    assert "evaluating" not in style_and_noise.run("eval", "style", "noise", "--data", held, "-q").err
