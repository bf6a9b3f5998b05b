"""compose --sweep: the losses of a stack over a grid of one or two of its members' weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl.cli.command import Context
from stackctl.cli.load_stacks import load_common_base, read_sets, score_stacks
from stackctl.core import NOISE
from stackctl.core.errors import Failed, Incompatible, StackctlError, Usage, attempt, gathering, raise_all
from stackctl.core.expressions import format_weight
from stackctl.core.weight_grid import Axis, grid_points, not_dominated, parse_axes, place_axes
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.planning import PlannedStack
from stackctl.registry.resolve import ResolvedStack
from stackctl.render import html as pages

if TYPE_CHECKING:
    from stackctl.engine.evaluation.scoring import DataSet, Score

MEAN = "mean"
"""What the mean of several data sets is called in their place."""


@dataclass(frozen=True)
class SweepRequest:
    """What was asked for: ranges as they are typed, and the data sets that the losses are of."""

    ranges: Sequence[str]
    data: Sequence[str]
    page: Path | None = None
    max_length: int = 1024
    device: str = "auto"


@dataclass(frozen=True)
class Swept:
    """A grid and what was found on it. ``rows`` are those of the JSON: point by point, of each the data sets in order
    and, of several, their mean. ``judged`` says of which the lowest loss is the best.
    """

    axes: list[Axis]
    data: Sequence[str]
    planned: PlannedStack
    rows: list[dict[str, Any]]
    best: dict[str, Any]
    trade_off: list[dict[str, Any]]
    notes: tuple[str, ...]

    @property
    def judged(self) -> str:
        return self.best["data"]  # type: ignore[no-any-return]

    def of(self, data: str) -> list[dict[str, Any]]:
        """The rows of one data set, or of the mean, in the order of the points."""
        return [row for row in self.rows if row["data"] == data]


def sweep_stack(context: Context, planned: PlannedStack, request: SweepRequest) -> Swept:
    """Try every point of the grid. Each is folded in as ``eval`` would, so that its loss is that of ``eval``.

    Everything that can be wrong is found, and said at once, before the base is loaded.
    """
    problems: list[StackctlError] = []
    axes, places = list[Axis](), list[int]()
    sets: list[DataSet] = []
    with gathering(problems):
        axes = parse_axes(request.ranges)
        places = place_axes(axes, [(member.adapter.name, member.label) for member in planned.stack.members])
        _check_plain([planned.stack.members[place] for place in places])
    if request.page is not None:
        attempt(problems, pages.check_page_place, request.page)
    with gathering(problems):
        _check_sources(request.data)
        sets = read_sets(context, planned, request.data, request.max_length)
    raise_all(problems)
    tried = [_weighted(planned, dict(zip(places, point, strict=True))) for point in grid_points(axes)]
    stacked = load_common_base(context, [planned], "auto", request.device)
    named = [(stack.pinned, plan) for stack, plan in tried]
    scores = score_stacks(context, stacked, named, sets, "trying weights", finite=False)
    return _found(axes, request.data, tried, scores)


def _check_plain(members: Sequence[ResolvedMember]) -> None:
    if layered := [member.label for member in members if member.layer_weights]:
        raise Incompatible(
            f"{', '.join(layered)} has weights by layer, in whose place one weight cannot be tried",
            hint="name the adapter itself in the expression, or learn them: --fit FILE --per layer",
        )


def _check_sources(data: Sequence[str]) -> None:
    if twice := [source for source in dict.fromkeys(data) if list(data).count(source) > 1]:
        raise Usage(f"--data {', '.join(twice)} is given twice", hint="name each data set once")
    if len(data) > 1 and MEAN in data:
        raise Usage(f"'{MEAN}' is what the mean of several data sets is called", hint=f"name it ./{MEAN}")


def _weighted(planned: PlannedStack, weights: dict[int, float]) -> PlannedStack:
    """A stack with other weights for some members."""
    members = tuple(replace(m, weight=weights.get(n, m.weight)) for n, m in enumerate(planned.stack.members))
    return planned.changed(replace(planned.stack, members=members))


def _found(axes: list[Axis], data: Sequence[str], tried: list[PlannedStack], scores: list[list[Score]]) -> Swept:
    from stackctl.engine.evaluation.scoring import judge, mean_loss

    losses = [mean_loss(own) for own in scores]
    finite = [number for number, loss in enumerate(losses) if math.isfinite(loss)]
    if not finite:
        raise Failed("no point of the grid has a loss that is a finite number", hint="try smaller weights")
    winner = min(finite, key=losses.__getitem__)
    rows: list[dict[str, Any]] = []
    for (stack, _), own in zip(tried, scores, strict=True):
        parts = list(zip(data, ([score] for score in own), ([score] for score in scores[winner]), strict=True))
        if len(data) > 1:
            parts.append((MEAN, own, scores[winner]))
        for source, mine, lowest in parts:
            row = {"data": source, **score_of_all(stack, mine)}
            rows.append({**row, "p_value": None if row["loss"] is None else judge(lowest, mine).p_value})
    each = len(rows) // len(tried)
    best = rows[(winner + 1) * each - 1]
    front = not_dominated([[score.loss for score in scores[number]] for number in finite]) if len(data) > 1 else []
    kept = sorted((finite[number] for number in front), key=lambda number: scores[number][0].loss)
    trade_off = [
        {
            "weights": weights_of(tried[n].stack),
            "losses": {s: score.loss for s, score in zip(data, scores[n], strict=True)},
        }
        for n in kept
    ]
    notes = _notes(axes, tried[winner].stack, [row for row in rows if row["data"] == best["data"]], scores[winner])
    return Swept(axes, data, tried[winner], rows, best, trade_off, notes)


def weights_of(stack: ResolvedStack) -> dict[str, Any]:
    """The weight of each member by its name; of one that has them by layer, these."""
    return {m.adapter.name: dict(m.layer_weights) or m.weight for m in stack.members}


def score_of_all(stack: ResolvedStack, scores: Sequence[Score]) -> dict[str, Any]:
    """A stack's weights, and the mean of its losses on some data sets; null where that is no finite number."""
    from stackctl.engine.evaluation.scoring import mean_error, mean_loss

    loss = mean_loss(scores)
    error = mean_error(scores) if math.isfinite(loss) else None
    return {"weights": weights_of(stack), "loss": loss if math.isfinite(loss) else None, "standard_error": error}


def _notes(
    axes: Sequence[Axis], best: ResolvedStack, rows: Sequence[dict[str, Any]], scores: Sequence[Score]
) -> tuple[str, ...]:
    """What a person should know of the best point: how far it stands out, and whether it lies at an end."""
    notes = []
    alike = sum(row["p_value"] is not None and row["p_value"] > NOISE for row in rows) - 1
    records = sum(len(score.records) for score in scores)
    if alike:
        notes.append(
            f"{alike} of the other {len(rows) - 1} points cannot be told from the best by {records} records "
            f"(p > {NOISE})"
        )
    weights = {name: m.weight for m in best.members for name in (m.adapter.name, m.label)}
    for axis in axes:
        weight = weights[axis.name]
        if len(axis.values) > 1 and weight in (axis.values[0], axis.values[-1]):
            notes.append(
                f"the best weight of {axis.name}, {format_weight(weight)}, is the last that was tried on that side"
            )
    if failed := sum(row["loss"] is None for row in rows):
        notes.append(f"{failed} of {len(rows)} points have a loss that is not a finite number")
    return tuple(notes)
