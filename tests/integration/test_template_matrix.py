"""Real chat templates times conversations of every shape: right, said or refused, and never wrong without a word."""

from __future__ import annotations

import pytest
from conversation_shapes import SHAPES
from template_matrix import PAGE, VERDICTS, row
from template_oracle import NAMES, Oracle


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_teaches(name: str) -> None:
    line, _, wrong = row(name)
    assert wrong == []
    assert line in PAGE.read_text(), "python tests/template_matrix.py writes the counts"


def test_the_page_adds_up() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    names = [name.strip() for name, *_ in rows]
    assert names[1:-1] == NAMES
    counts = [[int(number.strip(" *")) for number in numbers] for _, *numbers in rows[1:]]
    assert [sum(column) for column in zip(*counts[:-1], strict=True)] == counts[-1]
    assert len(counts[-1]) == len(VERDICTS)


@pytest.mark.parametrize(
    ("shape", "prompt", "written", "reason"),
    [
        ("one turn", "<｜User｜>What is 2+2?<｜Assistant｜><think>\n", "It is 4.<｜end▁of▁sentence｜>", "never closed"),
        (
            "one turn",
            "<｜User｜>What is 2+2?<｜Assistant｜>",
            "It is 4.<｜end▁of▁sentence｜>",
            "no prompt of that moment",
        ),
        ("one turn", "<｜User｜>What is 2+2?<｜Assistant｜><think>\n", "</think>It is 4.", "no end of turn"),
        (
            "reasoning_content",
            "<｜User｜>What is 2+2?<｜Assistant｜><think>\n",
            "</think>It is 4.<｜end▁of▁sentence｜>",
            "no thought",
        ),
        (
            "one turn",
            "<｜User｜>What is 2+2?<｜Assistant｜><think>\n",
            "</think>It is 4.<｜end▁of▁sentence｜><｜User｜>more",
            "goes on with 'more'",
        ),
    ],
)
def test_the_judge_sees_what_is_wrong(shape: str, prompt: str, written: str, reason: str) -> None:
    case = SHAPES[shape]
    wrong = Oracle("deepseek_r1_distill").judge(case, case.wanted[0], "<|oracle_bos|>" + prompt, written)
    assert any(reason in found for found in wrong), wrong
