"""What is said before the first step, by a run and by ``--dry-run``: enough to see that the data are what one meant."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
from tiny_registry import CHAT

LONG = {"messages": [{"role": "user", "content": "x" * 100}, {"role": "assistant", "content": "y" * 100}]}
ENDLESS = {"messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]}


def test_a_dry_run_tells_what_is_cut_what_is_left_out_and_what_is_learned(h: Any) -> None:
    records = [*CHAT, LONG, ENDLESS, LONG, ENDLESS]
    lengths = [len(oracle.label(record)[0]) for record in records]
    limit = 200
    data = h.data(records)
    found = h.run("train", "new", "--data", data, "--max-length", limit, "--dry-run", "--json").json
    assert found["unsupervised"] == [len(CHAT) + 2, len(CHAT) + 4]
    assert found["truncated"] == sum(limit < length for length in lengths) == 4
    assert found["supervised_share"] == found["supervised_tokens"] / found["tokens"]
    pieces = found["preview"]
    assert [piece["text"] for piece in pieces if piece["supervised"]] == ["Well met, friend.<|im_end|>"]
    assert [piece["supervised"] for piece in pieces] == [False, True]


def test_a_run_says_the_same_before_its_first_step(h: Any) -> None:
    data = h.data([*CHAT, ENDLESS])
    ran = h.run("train", "new", "--data", data, "--max-length", 200, "--max-steps", 1, "--rank", 2)
    before = ran.err[: ran.err.index("training new: step 1")]
    assert f"from line {len(CHAT) + 1}: left out" in before
    assert "% of them supervised" in before
    assert "⟦Well met, friend.<|im_end|>⟧" in before
    assert "were cut to 200 tokens" in before


def test_a_stack_that_cannot_be_live_is_refused_by_a_dry_run_too(h: Any) -> None:
    h.add("style", seed=1, modules_to_save=["lm_head"])
    for dry in ([], ["--dry-run"]):
        error = h.train("new", "--frozen", "live", *dry, on="style", code=4)["error"]
        assert "whole modules, which cannot be kept live" in error["message"]
        assert "--frozen fold" in error["hint"]


@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_records_without_an_assistant_turn_are_named_by_line(h: Any, fails: Any, shape: str) -> None:
    spelled = {"messages": ("role", "content", "assistant"), "conversations": ("from", "value", "gpt")}[shape]
    role, content, assistant = spelled
    good = {shape: [{role: "user", content: "a"}, {role: assistant, content: "b"}]}
    bad = {shape: [{role: "user", content: "a"}]}
    said = fails("train", "new", "--data", h.data([good, bad, good, bad]), code=2)
    assert "line 2: has no assistant turn" in said and "line 4: has no assistant turn" in said
