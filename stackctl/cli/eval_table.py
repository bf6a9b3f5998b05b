"""What ``eval`` found, as JSON, as a table, and in plain words. No tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from stackctl.core import NOISE

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stackctl.engine.evaluation.harness import TaskScore
    from stackctl.engine.evaluation.scoring import Score
    from stackctl.engine.evaluation.significance import PairedTest

_BEST = {"loss": min, "perplexity": min, "accuracy": max}
_TASK_COLUMNS = ("task", "metric", "stack", "value", "±", "records")
_PAIR_COLUMNS = ("stack", "ranked rightly", "±", "margin", "±", "loss of the chosen", "pairs")
COLUMNS = ("stack", "loss", "±", "perplexity", "accuracy", "tokens", "records")


def score_json(stack: str, source: str, score: Score, reference: tuple[str, Score] | None = None) -> dict[str, Any]:
    """A row of ``results``; what is no finite number is null. Pairs are ranked compared with a ``reference``."""
    return {
        "stack": stack,
        "data": source,
        "loss": score.loss,
        "standard_error": score.standard_error,
        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
        "accuracy": score.accuracy,
        "tokens": score.tokens,
        "records": len(score.records),
        **(_ranking_json(score, *reference) if reference else {}),
    }


def _ranking_json(score: Score, against: str, other: Score) -> dict[str, Any]:
    """What a row of pairs has besides: ``accuracy`` is then that of the ranking."""
    from stackctl.engine.evaluation.significance import ranking

    if score.gaps is None or other.gaps is None:
        return {}
    found = ranking(score.gaps, other.gaps)
    return {
        "accuracy": found.accuracy,
        "accuracy_standard_error": found.accuracy_error,
        "margin": found.margin,
        "margin_standard_error": found.margin_error,
        "against": against,
    }


def scores_json(
    names: Sequence[str],
    data: Sequence[str],
    scores: Sequence[Sequence[Score]],
    reference: tuple[str, Sequence[Score]] = ("", ()),
) -> list[dict[str, Any]]:
    """A row for stack i on data set j out of ``scores[i][j]``, stack by stack.

    ``reference`` is what pairs are ranked compared with, and its scores.
    """
    against, others = reference
    return [
        score_json(name, source, score, (against, others[number]) if others else None)
        for name, found in zip(names, scores, strict=True)
        for number, (source, score) in enumerate(zip(data, found, strict=True))
    ]


def comparison_json(stack: str, against: str, source: str, test: PairedTest) -> dict[str, Any]:
    """A row of ``comparisons``."""
    better = None if test.p_value > NOISE else stack if test.difference < 0 else against
    return {"stack": stack, "against": against, "data": source, **asdict(test), "better": better}


def by_data(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each data set, in the order in which the sets were given."""
    order = list(dict.fromkeys(row["data"] for row in rows))
    found = sorted(rows, key=lambda row: order.index(row["data"]))  # stable: the stacks keep their order
    return [(source, list(group)) for source, group in groupby(found, key=lambda row: row["data"])]


def cells(row: dict[str, Any]) -> list[str]:
    """A row's texts, one for each of ``COLUMNS``."""
    error, perplexity = row["standard_error"], row["perplexity"]
    return [
        row["stack"],
        f"{row['loss']:.4f}",
        "" if error is None else f"{error:.4f}",
        "inf" if perplexity is None else f"{perplexity:.3f}",
        f"{row['accuracy']:.1%}",
        f"{row['tokens']:,}",
        f"{row['records']:,}",
    ]


def best_cells(rows: Sequence[dict[str, Any]]) -> set[tuple[int, str]]:
    """(row, column) of the best values in each column, as far as they are shown; none where all are alike."""
    texts = [dict(zip(COLUMNS, cells(row), strict=True)) for row in rows]
    found = set()
    for column, choose in _BEST.items():
        values = [math.inf if row[column] is None else row[column] for row in rows]
        winner = texts[values.index(choose(values))][column]
        alike = {index for index, text in enumerate(texts) if text[column] == winner}
        if len(alike) < len(rows):
            found |= {(index, column) for index in alike}
    return found


def render_scores(rows: Sequence[dict[str, Any]], tests: Sequence[dict[str, Any]] = ()) -> RenderableType:
    """A table for each data set, the best of each column marked, and what the paired tests say under them."""
    from rich.text import Text

    from stackctl.render.tables import marked, spaced, table

    parts: list[RenderableType] = []
    blocks = by_data(rows)
    for source, block in blocks:
        if "margin" in block[0]:
            parts.append(_pairs_table(block, source))
            continue
        best = best_cells(block)

        lines = [
            [
                marked(text, (index, column) in best) if column in _BEST else Text(text)
                for column, text in zip(COLUMNS, cells(row), strict=True)
            ]
            for index, row in enumerate(block)
        ]
        heads = [f"{column} " if column in _BEST else column for column in COLUMNS]
        parts.append(table(heads, lines, title=source if len(blocks) > 1 else None))
        if said := sentences([test for test in tests if test["data"] == source]):
            parts.append(Text("\n".join(said)))
    return spaced(parts)


def _pairs_table(block: Sequence[dict[str, Any]], source: str) -> RenderableType:
    """A row for each stack: how it ranks the pairs of a data set, compared with a stack or the base."""
    from stackctl.render.tables import table

    lines = [
        [
            row["stack"],
            f"{row['accuracy']:.1%}",
            "" if row["accuracy_standard_error"] is None else f"{row['accuracy_standard_error']:.1%}",
            f"{row['margin']:.3f}",
            "" if row["margin_standard_error"] is None else f"{row['margin_standard_error']:.3f}",
            f"{row['loss']:.4f}",
            f"{row['records']:,}",
        ]
        for row in block
    ]
    return table(_PAIR_COLUMNS, lines, title=f"{source}, compared with {block[0]['against']}")


def sentences(tests: Sequence[dict[str, Any]]) -> list[str]:
    """What paired tests say, a sentence each; a stack against itself only when there is nothing else to say."""
    others = [test for test in tests if test["stack"] != test["against"]]
    return [sentence(test) for test in others or tests]


def sentence(test: dict[str, Any]) -> str:
    """What one paired test says, in plain words."""
    stack, other, records = test["stack"], test["against"], test["records"]
    if stack == other:
        return f"{stack} against itself: no difference"
    error = test["standard_error"]
    gap = f"{abs(test['difference']):.3g}" + (f" ± {error:.2g}" if error is not None else "") + " nats"
    chance = f"p = {test['p_value']:.2g}" if test["p_value"] >= 0.001 else "p < 0.001"
    if test["better"] is None:
        shown = f"these {records} records" if records > 1 else "a single record"
        return f"{stack} and {other}: no difference that {shown} can show ({gap} apart, {chance})"
    worse = other if test["better"] == stack else stack
    return f"{test['better']} is better than {worse} by {gap} ({chance}, {records} records)"


# -- tasks of lm-evaluation-harness ------------------------------------------------------------------------------------


def render_tasks(scores: Sequence[TaskScore]) -> RenderableType:
    """A table with the stacks of each metric under one another, the best marked."""
    from stackctl.render.tables import marked, table

    rows = []
    for task, metric in dict.fromkeys((score.task, score.label) for score in scores):
        block = [score for score in scores if (score.task, score.label) == (task, metric)]
        best = _best_value(block)
        for number, score in enumerate(block):
            text = f"{score.value:.4f}"
            error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
            first = ("", "") if number else (task, metric)
            rows.append([*first, score.stack, marked(text, text == best), error, f"{score.records:,}"])
    return table([f"{name} " if name == "value" else name for name in _TASK_COLUMNS], rows)


def _best_value(block: Sequence[TaskScore]) -> str | None:
    """The best value as it is shown; None where all are alike, or where nobody says which way is better."""
    texts = {f"{score.value:.4f}" for score in block}
    if len(texts) == 1 or block[0].higher_is_better is None:
        return None
    choose = max if block[0].higher_is_better else min
    return f"{choose(score.value for score in block):.4f}"
