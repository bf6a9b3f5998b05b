"""compose --method best: the sum, the fitted sum and every other method, judged on the same records kept apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec

from stackctl.cli.command import Context
from stackctl.cli.fit_weights import Chosen, FitRequest, learn_weights, read_halves, read_weighted, too_few
from stackctl.cli.load_stacks import load_common_base, score_stacks
from stackctl.cli.sweep_weights import score_of_all
from stackctl.core import NOISE
from stackctl.core.errors import Incompatible, StackctlError, attempt, raise_all
from stackctl.core.expressions import format_weight
from stackctl.plan.methods import candidates
from stackctl.plan.stack_plan import StackPlan
from stackctl.plan.token_rows import rows_without_sum
from stackctl.registry.planning import PlannedStack

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stackctl.cli.fit_weights import FitData
    from stackctl.engine.evaluation.scoring import Score
    from stackctl.engine.evaluation.weighted_members import WeightedFactors


@dataclass(frozen=True)
class _Tried:
    """One way to compose the members, and what of it is said in words."""

    planned: PlannedStack
    settings: str = ""
    fitted: bool = False

    @property
    def name(self) -> str:
        return f"{self.planned.stack.method}{f' ({self.settings})' if self.settings else ''}"


def best_stack(context: Context, planned: PlannedStack, request: FitRequest) -> Chosen:
    """Try everything, and choose what is best on the held-out records if that is more than chance.

    What ``--fit`` would learn is among what is tried. Everything that can be wrong is found, and said at once, before
    the base is loaded.
    """
    problems: list[StackctlError] = []
    attempt(problems, _check_has_methods, planned.plan)
    weighted: WeightedFactors = attempt(problems, read_weighted, planned, request.per)
    sets: FitData = attempt(problems, read_halves, context, planned, request)
    raise_all(problems)
    stacked = load_common_base(context, [planned], "auto", request.device)
    others = list(_other_methods(planned, request.seed))
    records = sum(len(set(data.owners)) for data in sets.held_out)
    context.output.status(
        f"learning the weights of the sum, then trying it and {len(others)} other ways on {records} held-out records"
    )
    learned, _ = learn_weights(context, stacked, planned, weighted, sets.learned, request.steps)
    tried = [_Tried(planned), _Tried(learned, f"learned per {request.per}", fitted=True), *others]
    named = [(one.name, one.planned.plan) for one in tried]
    both = [*sets.learned, *sets.held_out]
    scores = score_stacks(context, stacked, named, both, "trying methods", finite=False)
    on_learned, on_held_out = zip(*map(sets.halves, scores), strict=True)
    return _judged(tried, request.holdout or request.data, on_learned, on_held_out)


def _check_has_methods(plan: StackPlan) -> None:
    if plan.token_rows:
        problem = rows_without_sum(plan.members[plan.token_rows[0].member].label, "any other method")
        raise Incompatible(problem.message, hint="learn the weights of the sum instead: --fit FILE")


def _other_methods(planned: PlannedStack, seed: int) -> Iterator[_Tried]:
    used = sum(member.is_used for member in planned.plan.members)
    for candidate in candidates(used, planned.plan.rank, seed):
        members = tuple(member.times(candidate.scale) for member in planned.stack.members)
        made = replace(planned.stack, members=members, method=candidate.method, options=candidate.options)
        yield _Tried(planned.changed(made), candidate.settings)


def _judged(
    tried: Sequence[_Tried], data: Sequence[str], learned: Sequence[Sequence[Score]], scores: Sequence[Sequence[Score]]
) -> Chosen:
    """The rows, and which of them is the best: the lowest loss of those that beat the typed sum by more than chance.

    What is no better than the typed sum on the records that are learned from is not in the running, so that it is no
    chance to be lucky on the others.
    """
    from stackctl.engine.evaluation.scoring import judge, mean_loss, record_gaps
    from stackctl.engine.evaluation.significance import best_of_many_p

    finite = [all(math.isfinite(score.loss) for score in own) for own in scores]
    others = [number for number in range(1, len(tried)) if finite[number]] if finite[0] else []
    before = [mean_loss(own) for own in learned]
    running = [number for number in others if before[number] < before[0]]
    among = best_of_many_p([record_gaps(scores[0], scores[number]) for number in running]) if running else []
    family = dict(zip(running, among, strict=True))
    rows = []
    for number, (one, own) in enumerate(zip(tried, scores, strict=True)):
        stack = one.planned.stack
        compared = judge(scores[0], own) if number in others else None
        rows.append(
            {
                "method": stack.method,
                "options": msgspec.to_builtins(stack.options),
                "settings": one.settings,
                "fitted": one.fitted,
                **score_of_all(stack, own),
                "difference": compared.after - compared.before if compared else None,
                "difference_error": compared.standard_error if compared else None,
                "p_value": compared.p_value if compared else None,
                "p_value_of_all": family.get(number),
                "loss_learned": before[number] if math.isfinite(before[number]) else None,
                "data": [
                    {"data": source, "loss": score.loss if math.isfinite(score.loss) else None}
                    for source, score in zip(data, own, strict=True)
                ],
            }
        )
    better = [n for n in running if rows[n]["difference"] < 0 and family[n] <= NOISE]
    best = min(better, key=lambda number: rows[number]["loss"], default=0)
    records = sum(len(score.records) for score in scores[0])
    json = {"tried": rows, "best": rows[best], "improved": best != 0, "held_out_records": records}
    return Chosen(tried[best].planned, json, _notes(tried, rows, best, (records, len(running))))


def _notes(tried: Sequence[_Tried], rows: Sequence[dict[str, Any]], best: int, counts: tuple[int, int]) -> list[str]:
    """In words. ``counts`` are those of the held-out records, and of what was in the running."""
    (records, running), typed = counts, rows[0]["loss"]
    if best:
        gap = f"{typed:.4f} to {rows[best]['loss']:.4f} on {records} held-out records"
        chance = f"p = {rows[best]['p_value_of_all']:.2g} for the best of {running}"
        return [f"{tried[best].name} is taken: the loss goes from {gap}, {chance}"]
    if typed is None:
        return ["the loss of the typed sum is not a finite number, so that nothing can be compared with it"]
    losses = {number: row["loss"] for number, row in enumerate(rows) if row["p_value_of_all"] is not None}
    notes = [f"the typed sum is kept: nothing else is better by more than chance on {records} held-out records"]
    if not losses:
        notes[0] += ", nor on those that are learned from"
    else:
        nearest = min(losses, key=losses.__getitem__)
        notes[0] += (
            f"; lowest of what is better on the others is {tried[nearest].name}, {typed:.4f} to {losses[nearest]:.4f}, "
            f"p = {rows[nearest]['p_value_of_all']:.2g} for the best of {running}"
        )
    return [*notes, *too_few(records)]


def best_table(found: dict[str, Any]) -> RenderableType:
    """All that was tried, the lowest loss first, the one that is taken marked."""
    from stackctl.render.tables import table

    rows = sorted(found["tried"], key=lambda row: math.inf if row["loss"] is None else row["loss"])
    cells = [
        (
            f"{row['method']}{' *' if row is found['best'] else ''}",
            row["settings"] or ", ".join(f"{name} {_weight(value)}" for name, value in row["weights"].items()),
            "not finite" if row["loss"] is None else f"{row['loss']:.4f}",
            "" if row["standard_error"] is None else f"{row['standard_error']:.4f}",
            "" if row["difference"] is None else f"{row['difference']:+.4f}",
            "" if row["p_value_of_all"] is None else f"{row['p_value_of_all']:.2g}",
        )
        for row in rows
    ]
    columns = ("method", "settings", "loss", "±", "against the sum", "p")
    return table(columns, cells, title=f"on {found['held_out_records']} held-out records")


def _weight(value: Any) -> str:
    return "by layer" if isinstance(value, dict) else format_weight(value)
