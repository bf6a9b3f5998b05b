"""What eval found, in a table and in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from stackctl.cli.eval_table import best_cells, by_data, render_scores, sentence
from stackctl.render.output import console


def row(stack: str, loss: float, **values: Any) -> dict[str, Any]:
    return {
        "stack": stack, "data": "a.jsonl", "loss": loss, "standard_error": 0.01, "perplexity": 2.0, "accuracy": 0.5,
        "tokens": 1234, "records": 10, **values,
    }  # fmt: skip


def comparison(**values: Any) -> dict[str, Any]:
    return {
        "stack": "style+instruct", "against": "style", "data": "a.jsonl", "difference": -0.1234,
        "standard_error": 0.031, "p_value": 0.0012, "records": 40, "better": "style+instruct", **values,
    }  # fmt: skip


def shown(capfd: pytest.CaptureFixture[str], *arguments: Any) -> list[str]:
    import sys

    console(sys.stdout).print(render_scores(*arguments))
    return [line.rstrip() for line in capfd.readouterr().out.splitlines()]


def test_the_best_of_each_column() -> None:
    rows = [row("base", 2.0, accuracy=0.4), row("a", 1.0, accuracy=0.3), row("b", 1.00001, accuracy=0.4)]
    best = {(0, "accuracy"), (1, "loss"), (2, "accuracy"), (2, "loss")}
    assert best_cells(rows) == best, "what looks alike is best together; where all are alike, none is"
    assert best_cells(rows[:1]) == set()
    infinite = [row("base", 900.0, perplexity=None), row("a", 1.0)]
    assert (1, "perplexity") in best_cells(infinite)


@pytest.mark.parametrize("columns", ["80", "200"])
def test_a_table_for_each_data_set_with_the_best_marked(
    columns: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    rows = [
        row(stack, loss, data=data)
        for stack, loss in (("base", 2.0), ("style+instruct", 1.5))
        for data in ("b.jsonl", "a.jsonl")
    ]
    assert [source for source, _ in by_data(rows)] == ["b.jsonl", "a.jsonl"]
    lines = shown(capfd, rows, [comparison()])
    assert max(map(len, lines)) <= int(columns)
    assert [line for line in lines if line.endswith(".jsonl")] == ["b.jsonl", "a.jsonl"]
    marked = [line.split() for line in lines if "*" in line]
    assert marked == [["style+instruct", "1.5000*", "0.0100", "2.000", "50.0%", "1,234", "10"]] * 2
    said = [number for number, line in enumerate(lines) if "is better" in line]
    assert len(said) == 1
    assert said[0] > lines.index("a.jsonl"), "under the table of its own data set"


def test_differences_in_plain_words() -> None:
    assert sentence(comparison()) == (
        "style+instruct is better than style by 0.123 ± 0.031 nats (p = 0.0012, 40 records)"
    )
    assert sentence(comparison(difference=0.2, better="style", p_value=0.0001)) == (
        "style is better than style+instruct by 0.2 ± 0.031 nats (p < 0.001, 40 records)"
    )
    assert sentence(comparison(better=None, p_value=0.4)) == (
        "style+instruct and style: no difference that these 40 records can show (0.123 ± 0.031 nats apart, p = 0.4)"
    )
    single = sentence(comparison(better=None, p_value=1.0, records=1, standard_error=None))
    assert "that a single record can show (0.123 nats apart, p = 1)" in single


def test_a_stack_against_itself_is_said_only_when_there_is_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    itself = comparison(stack="style", difference=0.0, p_value=1.0, better=None)
    rows = [row("style", 1.0), row("style+instruct", 0.9)]
    assert "itself" not in " ".join(shown(capfd, rows, [itself, comparison()]))
    assert "style against itself: no difference" in shown(capfd, rows[:1], [itself])
