"""What compare shows: columns that can be read on any terminal, and a page that keeps what it was given."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from rich.cells import cell_len
from webpage import Page

from stackctl.cli.comparison import comparison_page, render_comparison
from stackctl.render.output import console

PROSE = "The sea was grey in the morning, and the boats lay still. Nobody came down to the harbour until noon. " * 3
CHINESE = "海面很静，没有风，船都停在港口里，直到中午也没有人来。" * 6
LONG = "x" * 300


def answer(stack: str, prompt: str, text: str, **values: Any) -> dict[str, Any]:
    return {
        "stack": stack, "prompt": prompt, "text": text, "prompt_tokens": 3, "new_tokens": 7, "stop": "end",
        "tokens_per_second": 1.0, "rounding_error": 0.0, **values,
    }  # fmt: skip


def score(stack: str, loss: float, data: str) -> dict[str, Any]:
    return {
        "stack": stack, "data": data, "loss": loss, "standard_error": 0.01, "perplexity": 2.0, "accuracy": 0.5,
        "tokens": 1234, "records": 10,
    }  # fmt: skip


# -- the terminal -----------------------------------------------------------------------------------------------------


def drawn(capfd: pytest.CaptureFixture[str], stacks: int, text: str, prompt: str = "Tell me.") -> list[str]:
    names = [f"stack-{number}" for number in range(stacks)]
    console(sys.stdout).print(render_comparison(names, [answer(name, prompt, text) for name in names]), crop=False)
    return capfd.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "text", [PROSE, CHINESE, LONG, "", "two\nlines, one\ttab"], ids=["prose", "cjk", "long", "none", "tab"]
)
@pytest.mark.parametrize("stacks", [2, 3, 5, 9])
@pytest.mark.parametrize("columns", [None, 40, 80, 200])
def test_columns_can_be_read_and_lines_are_not_ragged(
    columns: int | None, stacks: int, text: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    lines = drawn(capfd, stacks, text)
    boxes = [line for line in lines if line[:1] in "╭│├╰"]
    assert {cell_len(line) for line in boxes} == {columns or 160}, "piped, or on a terminal: as wide as it is"
    heads = [line for line in boxes if "stack-" in line]
    assert "".join(heads).count("stack-") == stacks
    if columns != 40:
        narrowest = min(cell_len(cell) - 2 for line in boxes if "│" in line for cell in line.split("│")[1:-1])
        assert narrowest >= 24
        counts = [line.count("stack-") for line in heads]
        assert max(counts) - min(counts) <= 1, "shared out evenly"
    else:
        assert all(line.count("stack-") == 1 for line in heads), "one under the other"


@pytest.mark.parametrize("columns", [80, 200])
def test_every_word_is_shown(columns: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = drawn(capfd, 1, PROSE)
    assert " ".join(" ".join(line.strip("│ ") for line in lines if line.startswith("│")).split()).endswith(
        PROSE.strip()
    )
    lines = drawn(capfd, 1, CHINESE)
    assert CHINESE in "".join(line.strip("│ ") for line in lines if line.startswith("│"))


# -- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>",
    "</p></article><img src=x onerror=alert(1)>",
    "\"quoted\" 'and' `ticked` & &amp; &#60;b&#62; {{ 7 * 7 }} {% raw %}",
    "\u202eback to front\u202c, שלום עולם, السلام عليكم",
    LONG,
    "two\nlines\n\n  and an indented one",
    "海面很静。",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_page_keeps_whatever_text_it_is_given(text: str) -> None:
    names = ["base", "style+instruct"]
    conversation = [{"role": "system", "content": text}, {"role": "user", "content": text}]
    answers = [
        answer("base", text, "plain words"),
        answer("style+instruct", text, text),
        answer("base", text, text, messages=conversation),
        answer("style+instruct", text, "", messages=conversation),
    ]
    page = Page(comparison_page(names, answers, [score(text, 1.0, text)], [(text, text)]))
    page.check_self_contained()
    assert page.texts("p", "text") == ["plain words", text, text, "no text"]
    assert page.texts("div", "text") == [text, text, text]
    assert page.texts("span", "role") == ["system", "user"]
    assert text in page.texts("dt") and text in page.texts("dd") and page.texts("caption") == [text]
    written = [a for tag, a, _ in page.elements if "text" in a.get("class", "").split()]
    assert all(attributes.get("dir") == "auto" for attributes in written), "each in its own direction"


def test_prompts_go_down_stacks_across_and_what_differs_is_marked() -> None:
    names = ["base", "style", "style+instruct"]
    texts = [
        ["the sea is wide", "the sea was wide", "the  sea is wide"],
        ["one two three", "one", "one two three four"],
    ]
    answers = [
        answer(name, f"prompt {row}", text, stop="length" if row else "end")
        for row, found in enumerate(texts)
        for name, text in zip(names, found, strict=True)
    ]
    page = Page(comparison_page(names, answers, [], [("base", "tiny")]))
    assert page.texts("div", "text") == ["prompt 0", "prompt 1"]
    assert page.texts("h3") == names * 2
    assert page.texts("mark") == ["marked", "was", "four"], "the legend's, and then what differs"
    notes = [" ".join(text.split()) for text in page.texts("p", "about")]
    assert notes == [
        "7 tokens", "7 tokens · 1 of 4 words differs", "7 tokens · the same words",
        "7 tokens, cut there", "7 tokens, cut there · 0 of 1 words differ, 2 left out",
        "7 tokens, cut there · 1 of 4 words differs",
    ]  # fmt: skip
    assert not page.texts("table"), "no data, no table"


def test_the_page_has_the_table_of_eval() -> None:
    names = ["base", "style"]
    scores = [
        score(name, loss, data) for name, loss in (("base", 2.0), ("style", 1.5)) for data in ("b.jsonl", "a.jsonl")
    ]
    page = Page(comparison_page(names, [answer(name, "x", "y") for name in names], scores, []))
    assert page.texts("caption") == ["b.jsonl", "a.jsonl"]
    assert page.texts("td", "best") == ["1.5000", "1.5000"]
    assert page.texts("th")[:7] == ["stack", "loss", "±", "perplexity", "accuracy", "tokens", "records"]
