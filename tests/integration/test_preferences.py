"""Objectives of pairs: by their formulas in float64, in whole runs on a frozen stack, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import logsigmoid

from stackctl.engine.training.objectives import OBJECTIVES, Pairs, Strength, ranked

PAIRS = [
    {"prompt": f"Say {word}:", "chosen": f" {word}" * (n + 1), "rejected": f" no {word}, and nothing else"}
    for n, word in enumerate(("red", "green", "blue", "black", "white", "grey"))
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


def _pairs() -> Pairs:
    torch.manual_seed(0)
    c, r, c0, r0 = (-torch.rand(4, 5) * 9 - 1).unbind()
    return Pairs(c, r, torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([5.0, 4, 3, 2, 1]), c0, r0)


def test_losses_are_those_of_the_papers_in_float64():
    p = _pairs()
    found = {name: objective.loss(p, Strength(0.3)) for name, objective in OBJECTIVES.items()}
    for i in range(5):
        c, r, nc, nr, c0, r0 = (float(t[i]) for t in vars(p).values())
        sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
        odds = lambda x: math.exp(x) / (1 - math.exp(x))  # noqa: E731
        expected = {
            "dpo": -math.log(sigmoid(0.3 * ((c - c0) - (r - r0)))),
            "ipo": ((c - c0) / nc - (r - r0) / nr - 1 / 0.6) ** 2,
            "orpo": -c / nc - 0.3 * math.log(sigmoid(math.log(odds(c / nc) / odds(r / nr)))),
            "simpo": -math.log(sigmoid(0.3 * (c / nc - r / nr) - 0.5)),
        }
        assert {name: float(losses[i]) for name, losses in found.items()} == pytest.approx(expected, rel=1e-5)


def test_smoothing_takes_a_share_of_pairs_the_other_way_round():
    p = _pairs()
    h = 0.3 * ((p.chosen - p.chosen_reference) - (p.rejected - p.rejected_reference))
    expected = -0.8 * logsigmoid(h) - 0.2 * logsigmoid(-h)
    torch.testing.assert_close(OBJECTIVES["dpo"].loss(p, Strength(0.3, 0.2)), expected)


def test_equal_answers_count_half():
    assert ranked(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_to_rank_on_a_frozen_stack(house, data, objective):
    h = house()
    h.train("one", "--max-steps", 1, "--dtype", "float32")
    done = h.run(
        "train", "taste", "--on", "one", "--data", data, "--objective", objective, "--max-steps", 12,
        "--dtype", "float32", "--learning-rate", "1e-2", "--batch-size", 3, "--json",
    ).json  # fmt: skip
    assert (done["objective"], done["beta"]) == (objective, 2.0 if objective == "simpo" else 0.1)
    assert 0 <= done["accuracy"] <= 1
    log = [json.loads(line) for line in (Path(done["path"]) / "training_log.jsonl").read_text().splitlines()]
    assert log[-1]["accuracy"] == 1
    assert log[-1]["margin"] > log[0]["margin"]
    if OBJECTIVES[objective].compares:
        assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    if objective == "dpo":
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_accumulation_and_layout_change_no_number(house, data):
    h = house()
    losses = []
    for name, flags in (("a", ("--batch-size", 6)), ("b", ("--batch-size", 2, "--gradient-accumulation", 3))):
        args = ("--data", data, "--objective", "dpo", "--max-steps", 4, "--dtype", "float32", "--json")
        done = h.run("train", name, *args, *flags).json
        log = (Path(done["path"]) / "training_log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_that_begins_at_another_adapter_is_compared_with_the_frozen_stack_without_it(house, data):
    h = house()
    args = ("--data", data, "--objective", "dpo", "--dtype", "float32", "--learning-rate", "1e-2", "--json")
    h.run("train", "first", *args, "--max-steps", 6)
    done = h.run("train", "second", *args, "--max-steps", 1, "--from", "first").json
    assert done["margin"] > 0.01


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--beta", 1), "--beta"),
        (("--objective", "ipo", "--label-smoothing", 0.1), "--label-smoothing"),
        (("--objective", "dpo", "--pack"), "--pack"),
    ],
)
def test_what_has_no_meaning_together_is_refused(house, data, flags, why):
    assert why in house().run("train", "x", "--data", data, *flags, code=2).err


def test_an_objective_of_pairs_wants_pairs(house, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    ran = house().run("train", "x", "--data", path, "--objective", "dpo", code=2)
    assert "takes pairs of answers" in ran.err


def test_a_frozen_stack_that_is_live_gives_the_run_of_one_that_is_folded(house, data):
    h = house()
    h.train("one", "--max-steps", 2, "--dtype", "float32")
    losses = []
    for name, frozen in (("a", "fold"), ("b", "live")):
        args = ("--on", "one", "--data", data, "--objective", "dpo", "--max-steps", 3, "--dtype", "float32", "--json")
        done = h.run("train", name, *args, "--frozen", frozen).json
        log = (Path(done["path"]) / "training_log.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in log])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
