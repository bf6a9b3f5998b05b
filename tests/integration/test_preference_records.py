"""Pairs of answers: every shape in which people write them, what they share, and what is refused by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_tokenizer

from stackctl.core.errors import Usage
from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import IGNORED, EncodeOptions
from stackctl.engine.records.read import read_records
from stackctl.engine.records.types import CompletionRecord, PreferenceRecord

USER = {"role": "user", "content": "Hi"}
GOOD, BAD = {"role": "assistant", "content": "Hello."}, {"role": "assistant", "content": "What?"}
AS_MESSAGES: dict[str, dict[str, Any]] = {
    "continuations": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "whole conversations": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a prompt beside whole conversations": {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "a text and turns": {"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Hi"}],
        "chosen": {"from": "gpt", "value": "Hello."},
        "rejected": {"from": "gpt", "value": "What?"},
    },
    "messages and texts": {"messages": [USER], "chosen": "Hello.", "rejected": "What?"},
}


def _written(tmp_path: Path, *records: Any) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("shape", AS_MESSAGES)
def test_every_shape_of_a_pair_is_the_same_pair(tmp_path, shape):
    tokenizer = tiny_tokenizer()
    found = encode(read_records(_written(tmp_path, AS_MESSAGES[shape])), tokenizer, EncodeOptions(100, answers=True))
    opening = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(example.input_ids) for example in found.examples] == [
        f"{opening}Hello.<|im_end|>", f"{opening}What?<|im_end|>",
    ]  # fmt: skip
    learned = [[label for label in example.labels if label != IGNORED] for example in found.examples]
    assert [tokenizer.decode(ids) for ids in learned] == ["Hello.<|im_end|>", "What?<|im_end|>"]
    assert found.owners == [1, 1]


def test_texts_are_joined_as_they_stand(tmp_path):
    (found,) = read_records(_written(tmp_path, {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"})).records
    assert found == PreferenceRecord(1, CompletionRecord(1, "2 + 2 =", " 4"), CompletionRecord(1, "2 + 2 =", " 5"))


def test_turns_before_the_answers_are_not_learned(tmp_path):
    before = [USER, GOOD, {"role": "user", "content": "And?"}]
    path = _written(tmp_path, {"chosen": [*before, GOOD], "rejected": [*before, BAD]})
    tokenizer = tiny_tokenizer()
    found = encode(read_records(path), tokenizer, EncodeOptions(200, answers=True))
    learned = [[label for label in example.labels if label != IGNORED] for example in found.examples]
    assert [tokenizer.decode(ids) for ids in learned] == ["Hello.<|im_end|>", "What?<|im_end|>"]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are equal"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [GOOD]}, "are equal"),
        ({"chosen": "b", "rejected": "c"}, "has no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no prompt"),
        ({"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' is a number"),
        ({"chosen": [USER, GOOD], "rejected": [USER]}, "'rejected' has no assistant turn of its own"),
    ],
)
def test_what_is_no_pair_is_named_by_line(tmp_path, record, why):
    path = _written(tmp_path, {"prompt": "x", "chosen": "y", "rejected": "z"}, record)
    with pytest.raises(Usage, match=f"line 2: .*{why}"):
        read_records(path)


def test_a_pair_of_which_one_answer_is_cut_away_is_left_out(tmp_path):
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = _written(tmp_path, short, {"prompt": "a" * 50, "chosen": "b", "rejected": "c"})
    found = encode(read_records(path), tiny_tokenizer(), EncodeOptions(20, answers=True))
    assert (len(found.examples), found.unsupervised) == (2, [2])


def test_a_pair_whose_answers_are_equal_after_the_cut_is_left_out(tmp_path):
    short = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = _written(tmp_path, short, {"prompt": "a", "chosen": "b" * 50 + "c", "rejected": "b" * 50 + "d"})
    found = encode(read_records(path), tiny_tokenizer(), EncodeOptions(20, answers=True))
    assert (len(found.examples), found.unsupervised, found.truncated) == (2, [2], 1)


def test_arguments_for_a_template_that_nothing_is_rendered_with_are_named(tmp_path):
    path = _written(tmp_path, {"prompt": "a", "completion": "b"})
    found = encode(read_records(path), tiny_tokenizer(), EncodeOptions(20, template={"enable_thinking": False}))
    assert found.notes == ["no record is a conversation, so that the chat template is not given enable_thinking"]


def test_without_pairs_the_chosen_answer_is_read_and_said(tmp_path):
    path = _written(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    found = encode(read_records(path), tiny_tokenizer(), EncodeOptions(20))
    assert tiny_tokenizer().decode(found.examples[0].input_ids) == "ab<|im_end|>"
    assert len(found.examples) == 1
    assert found.notes == ["of 1 pairs of answers 'chosen' is read, and 'rejected' is ignored"]
