"""Scores on tasks of lm-evaluation-harness, as JSON and as a table. No tensors, and nothing of the harness itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

_COLUMNS = ("task", "metric", "stack", "value", "±", "records")


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task, or of a group of tasks.

    ``filter`` is how the harness picked an answer out of what the model wrote, ``none`` where it did not.
    ``standard_error`` is the harness's own, None where it has none. ``higher_is_better`` is None where the task does
    not say.
    """

    stack: str
    task: str
    metric: str
    filter: str
    value: float
    standard_error: float | None
    higher_is_better: bool | None
    records: int
    num_fewshot: int | None
    version: str | None

    def json(self) -> dict[str, Any]:
        """A row of ``tasks``."""
        return asdict(self)

    @property
    def label(self) -> str:
        """The metric, with the filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


def render_tasks(scores: Sequence[TaskScore]) -> RenderableType:
    """A table with the stacks of each metric under one another, the best marked."""
    from rich.text import Text

    from stackctl.render.tables import table

    rows = []
    for task, metric in dict.fromkeys((score.task, score.label) for score in scores):
        block = [score for score in scores if (score.task, score.label) == (task, metric)]
        best = _best(block)
        for number, score in enumerate(block):
            text = f"{score.value:.4f}"
            value = Text(f"{text}*", "bold green") if text == best else Text(f"{text} ")
            error = "" if score.standard_error is None else f"{score.standard_error:.4f}"
            first = ("", "") if number else (task, metric)
            rows.append([*first, score.stack, value, error, f"{score.records:,}"])
    return table([f"{name} " if name == "value" else name for name in _COLUMNS], rows)


def _best(block: Sequence[TaskScore]) -> str | None:
    """The best value as it is shown; None where all are alike, or where nobody says which way is better."""
    texts = {f"{score.value:.4f}" for score in block}
    if len(texts) == 1 or block[0].higher_is_better is None:
        return None
    choose = max if block[0].higher_is_better else min
    return f"{choose(score.value for score in block):.4f}"
