"""The loss of a stack: raw PEFT with all members live, on the tokens that are supervised and no others."""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import torch
from house import CHAT, TEXTS

ROWS = {
    "base": [],
    "style": [("style", 1)],
    "style+instruct": [("style", 1), ("instruct", 1)],
    "style:0.5+instruct:-1": [("style", 0.5), ("instruct", -1)],
}


@pytest.mark.parametrize("records", [CHAT, TEXTS], ids=["messages", "text"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mixtral"])
def test_loss_is_that_of_raw_peft_live(house: Any, name: str, records: list[dict[str, Any]]) -> None:
    h = house(name)
    targets = {"target_modules": ["q_proj", "v_proj"]} if name == "mixtral" else {}
    h.add("style", seed=1, **targets)
    h.add("instruct", seed=2, r=2, use_rslora=True, **targets)
    found = h.run("eval", *ROWS, "--data", h.data(records), "--json").json["results"]
    assert [row["stack"] for row in found] == list(ROWS), "a row for each stack, in the order asked for"
    for row, members in zip(found, ROWS.values(), strict=True):
        wanted = oracle.loss(oracle.live(h.base, *h.members(*members)), records)
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
        assert row["tokens"] == oracle.supervised_count(records)
        assert row["records"] == len(records)
    assert len({round(row["loss"], 4) for row in found}) == len(ROWS)


def test_a_stacks_loss_does_not_depend_on_its_company(house: Any) -> None:
    """Stacks are folded one after another into the same weights; each must come out as if it were alone."""
    h = house("tied")
    h.add("style", seed=1, target_modules=["embed_tokens", "q_proj"])
    h.add("head", seed=2, target_modules=["lm_head"])
    data = h.data(CHAT)

    def losses(*what: str) -> list[float]:
        return [row["loss"] for row in h.run("eval", *what, "--data", data, "--json").json["results"]]

    together = losses("style", "head", "base", "style+head", "style", "base")
    assert [together[0], together[4]] == losses("style") * 2
    assert [together[2], together[5]] == losses("base") * 2


def test_the_current_stack_and_a_named_one(house: Any) -> None:
    h = house()
    h.add("style", seed=1)
    h.add("instruct", seed=2)
    h.run("compose", "style:0.5+instruct", "--name", "teller")
    data = h.data(CHAT)
    wanted = oracle.loss(oracle.live(h.base, *h.members(("style", 0.5), ("instruct", 1))), CHAT)
    for what in ([], ["teller"]):
        row = h.run("eval", *what, "--data", data, "--json").json["results"][0]
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["stack"] == "teller"
    double = h.run("eval", "teller:2", "--data", data, "--json").json["results"][0]["loss"]
    twice = oracle.live(h.base, *h.members(("style", 1), ("instruct", 2)))
    assert double == pytest.approx(oracle.loss(twice, CHAT), rel=1e-5)


def test_what_is_too_long_is_cut_and_still_counted_right(house: Any) -> None:
    h = house()
    long = [{"text": "abc " * 40}, {"text": "short"}]
    cut = [{"text": "abc " * 8}, {"text": "short"}]
    found = h.run("eval", "base", "--data", h.data(long), "--max-length", 32, "--json").json["results"][0]
    assert found["tokens"] == 31 + 5
    model = oracle.live(h.base)
    first, second = (float(oracle.loss_sum(model, record).detach()) for record in cut)
    ids, _ = oracle.label(cut[0])
    out = oracle.logits(model, torch.tensor([ids]))
    # No end is learned where a text was cut.
    last = -float(out[-2].log_softmax(-1)[ids[-1]])
    assert found["loss"] == pytest.approx((first - last + second) / 36, rel=1e-5)


def test_a_training_is_better_on_what_it_learned(house: Any) -> None:
    h = house()
    h.train("style", "--max-steps", 30, "--learning-rate", 0.01, records=TEXTS)
    held = h.data(TEXTS)
    base, style = h.run("eval", "base", "style", "--data", held, "--json").json["results"]
    assert style["loss"] < base["loss"] - 0.5
    again = oracle.loss(oracle.live(h.base, (h.weights("style"), 1)), TEXTS)
    assert style["loss"] == pytest.approx(again, rel=1e-5)
