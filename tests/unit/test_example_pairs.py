"""The pairs of ``examples/``: as many as the how-to says, all different, and none of them asked in the demo's chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / name).read_text(encoding="utf-8").splitlines()]


def test_sixty_pairs_of_which_no_prompt_is_asked_twice() -> None:
    learned, held_out = records("taste.jsonl"), records("taste-heldout.jsonl")
    assert (len(learned), len(held_out)) == (44, 16)
    asked = [record["prompt"][0]["content"] for record in (*learned, *held_out)]
    chats = {
        r["messages"][0]["content"] for name in ("instruct.jsonl", "instruct-heldout.jsonl") for r in records(name)
    }
    assert len(set(asked)) == 60 and not chats & set(asked)


def test_what_is_preferred_keeps_the_voice_and_is_short() -> None:
    for record in (*records("taste.jsonl"), *records("taste-heldout.jsonl")):
        chosen, rejected = (record[key][0]["content"] for key in ("chosen", "rejected"))
        assert chosen.startswith("Asked and entered: ") and chosen.endswith(" That is the entry.")
        assert chosen != rejected and len(chosen) < 140
