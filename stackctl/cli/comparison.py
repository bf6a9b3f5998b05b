"""What ``compare`` found, on the terminal and as a page. No tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl.cli.eval_table import COLUMNS, best_cells, by_data, cells, render_scores
from stackctl.core.expressions import BASE
from stackctl.render.text_diff import compare_words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stackctl.engine.generation import Sampling
    from stackctl.registry.planning import PlannedStack


def by_prompt(names: Sequence[str], answers: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The answers to each prompt, one of each stack."""
    width = len(names)
    return [list(answers[start : start + width]) for start in range(0, len(answers), width)]


def render_comparison(
    names: Sequence[str],
    answers: Sequence[dict[str, Any]],
    scores: Sequence[dict[str, Any]] = (),
    said: str | None = None,
) -> RenderableType:
    """The answers side by side, a box for each prompt, and the table of the scores under them."""
    from rich.console import Group
    from rich.text import Text

    from stackctl.render.tables import SideBySide

    parts: list[RenderableType] = []
    for row in by_prompt(names, answers):
        parts += [Text()] if parts else []
        parts.append(SideBySide(row[0]["prompt"], names, [answer["text"].strip() for answer in row]))
    parts += [render_scores(scores)] if scores else []
    parts += [Text(said, no_wrap=True, overflow="ignore")] if said else []  # a path to copy is whole
    return Group(*parts)


def comparison_page(
    names: Sequence[str],
    answers: Sequence[dict[str, Any]],
    scores: Sequence[dict[str, Any]],
    settings: Sequence[tuple[str, str]],
) -> str:
    """One page: prompts down, stacks across, what differs from the first stack's answer marked, scores, settings."""
    from stackctl.render.html import render_page

    prompts = [
        {
            "turns": row[0].get("messages") or [{"role": None, "content": row[0]["prompt"]}],
            "cards": [_card(answer, row[0]) for answer in row],
        }
        for row in by_prompt(names, answers)
    ]
    tables = [
        {"source": source, "rows": [cells(row) for row in rows], "best": best_cells(rows)}
        for source, rows in by_data(scores)
    ]
    return render_page(
        "comparison.html",
        title=" · ".join(names),
        first=names[0],
        prompts=prompts,
        columns=COLUMNS,
        tables=tables,
        settings=settings,
    )


def _card(answer: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """One answer beside the first stack's to the same prompt."""
    return {
        "name": answer["stack"],
        "words": compare_words(first["text"].strip(), answer["text"].strip()),
        "about": f"{answer['new_tokens']:,} tokens" + (", cut there" if answer["stop"] == "length" else ""),
    }


def settings_of(
    stacks: Sequence[PlannedStack], sampling: Sampling, precision: str, data: Sequence[str], max_length: int
) -> list[tuple[str, str]]:
    """How a comparison was made, as pairs of name and value: enough to make it again."""
    base = stacks[0][0].base
    source = "" if Path(base.source).is_absolute() else f" ({base.source})"  # somebody's folder tells a reader nothing
    revision = f" at {base.revision[:12]}" if base.revision else ""
    pairs = [("base", f"{base.name}{source}{revision}")]
    pairs += [(stack.text, stack.pinned) for stack, _ in stacks if stack.pinned != BASE]
    pairs += [("computed in", precision), ("answers", _how(sampling))]
    pairs += [("system message", sampling.system)] if sampling.system else []
    pairs += [("prompts", "as given, without the chat template")] if sampling.raw else []
    pairs += [("measured on", f"{source}, records of at most {max_length:,} tokens") for source in data]
    return pairs


def _how(sampling: Sampling) -> str:
    """How tokens were chosen, in words."""
    options = {
        "temperature": None if sampling.greedy else sampling.temperature,
        "top-p": None if sampling.greedy else sampling.top_p,
        "top-k": None if sampling.greedy else sampling.top_k,
        "min-p": None if sampling.greedy else sampling.min_p,
        "repetition penalty": sampling.repetition_penalty,
        "seed": None if sampling.greedy else sampling.seed,
    }
    said = ["greedy decoding"] if sampling.greedy else []
    said += [f"{name} {value}" for name, value in options.items() if value is not None]
    said += [f"ended before {text!r}" for text in sampling.stop]
    return ", ".join([*said, f"at most {sampling.max_new_tokens:,} tokens"])
