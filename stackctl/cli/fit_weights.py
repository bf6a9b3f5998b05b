"""compose --fit: the weights of a stack learned from data, and taken where they are better on records kept apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from stackctl.cli.command import Context
from stackctl.cli.load_stacks import load_common_base, read_sets, score_stacks
from stackctl.cli.progress import share_progress
from stackctl.cli.sweep_weights import weights_of
from stackctl.core.errors import Incompatible, StackctlError, Usage, gathering, raise_all
from stackctl.core.expressions import format_weight
from stackctl.plan.build import plan_stack
from stackctl.plan.layer_weights import Per
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.planning import PlannedStack

if TYPE_CHECKING:
    from stackctl.engine.evaluation.scoring import DataSet, Judged, Score
    from stackctl.engine.evaluation.weighted_members import WeightedFactors
    from stackctl.engine.models import StackedModel

_NEXT_TO_NOTHING = 0.02
"""A member whose weights are all smaller than this can be left out."""
_FEWEST = 6
"""Held-out records with which the test can find a difference: of five, all alike, chance has 1 in 16."""


@dataclass(frozen=True)
class FitRequest:
    """What was asked for. ``holdout`` are data sets to judge by; without any, half of the records are."""

    data: Sequence[str]
    per: Per = "member"
    holdout: Sequence[str] = field(default_factory=tuple)
    steps: int = 30
    seed: int = 0
    max_length: int = 1024
    device: str = "auto"


@dataclass(frozen=True)
class FitData:
    """Data sets to learn from and to judge by; no record is in both."""

    learned: list[DataSet]
    held_out: list[DataSet]

    def halves(self, scores: Sequence[Score]) -> tuple[Sequence[Score], Sequence[Score]]:
        """A stack's scores on all of them: those to learn from, and those to judge by."""
        return scores[: len(self.learned)], scores[len(self.learned) :]


@dataclass(frozen=True)
class Chosen:
    """The stack that is to be written, what the JSON of ``compose`` says of how it was chosen, and notes."""

    planned: PlannedStack
    json: dict[str, Any]
    notes: list[str]


def fit_stack(context: Context, planned: PlannedStack, request: FitRequest) -> Chosen:
    """The stack with the weights that it is to have. All that can be wrong is found before the base is loaded."""
    weighted = read_weighted(planned, request.per)
    sets = read_halves(context, planned, request)
    from stackctl.engine.evaluation.scoring import judge, mean_loss

    stacked = load_common_base(context, [planned], "auto", request.device)
    fitted, steps = learn_weights(context, stacked, planned, weighted, sets.learned, request.steps)
    weights = weights_of(fitted.stack)
    plans = [("typed", planned.plan), ("tried", fitted.plan)]
    scores = score_stacks(context, stacked, plans, [*sets.learned, *sets.held_out], "judging")
    (typed, typed_held_out), (tried, tried_held_out) = map(sets.halves, scores)
    judged = judge(typed_held_out, tried_held_out)
    taken = judged.is_better
    fit = {
        "per": request.per,
        "records": _records(sets.learned),
        "held_out_records": _records(sets.held_out),
        "steps": steps,
        "loss_before": mean_loss(typed),
        "loss_after": mean_loss(tried if taken else typed),
        "held_out_before": judged.before,
        "held_out_after": judged.after if taken else judged.before,
        "standard_error": judged.standard_error,
        "p_value": judged.p_value,
        "fitted": taken,
        "weights": weights if taken else weights_of(planned.stack),
        "tried": {"weights": weights, "loss": mean_loss(tried), "held_out": judged.after},
        "leave_out": [name for name, value in weights.items() if _is_nothing(value)] if taken else [],
    }
    return Chosen(fitted if taken else planned, {"fit": fit}, _notes(fit, judged))


def _records(sets: Sequence[DataSet]) -> int:
    return sum(len(set(data.owners)) for data in sets)


def read_weighted(planned: PlannedStack, per: Per) -> WeightedFactors:
    """The members' factors, with the weights that can be learned.

    Raises:
        Usage, Incompatible, VerificationFailed: there is nothing to learn, or a tensor holds NaN or infinity.
    """
    _check_fits(planned)
    from stackctl.engine.evaluation.weighted_members import read_factors

    every = _with_all_factors(planned.plan)
    weighted = read_factors(every, per)
    return replace(weighted, plan=replace(every, members=planned.plan.members))  # which say where each weight begins


def _check_fits(planned: PlannedStack) -> None:
    if not planned.stack.members:
        raise Usage("the base alone has no weights to learn", hint="name adapters: stackctl compose style --fit FILE")
    if planned.plan.replacements:
        raise Incompatible(
            f"{planned.plan.brought}, whose weight is not learned", hint="compose it without --fit or --method best"
        )


def _with_all_factors(plan: StackPlan) -> StackPlan:
    """The same members with a weight of one, so that those that begin at zero are there as well."""
    members = [replace(member, weight=1.0, layer_weights={}) for member in plan.members]
    return plan_stack(plan.base, members).check()


def read_halves(context: Context, planned: PlannedStack, request: FitRequest) -> FitData:
    """The records in tokens, before the base is loaded: those of ``holdout``, or half of them, to judge by.

    Raises:
        StackctlError: everything that is wrong with any of them, at once.
    """
    from stackctl.engine.evaluation.weight_fit import halve, shorten

    problems: list[StackctlError] = []
    sets: list[DataSet] = []
    held_out: list[DataSet] = []
    with gathering(problems):
        sets = read_sets(context, planned, request.data, request.max_length)
    with gathering(problems):
        held_out = read_sets(context, planned, request.holdout, request.max_length) if request.holdout else []
    raise_all(problems)
    if not request.holdout:
        halves = [halve(data, request.seed) for data in sets]
        sets, held_out = [learned for learned, _ in halves], [kept for _, kept in halves]
    learned = [shorten(data, request.seed, planned.stack.base.parameters) for data in sets]
    for whole, part in zip(sets, learned, strict=True):
        if part is not whole:
            count, total = len(set(part.owners)), len(set(whole.owners))
            context.output.note(f"{count} of {total} records of {whole.source} are learned from: more only take longer")
    return FitData(learned, held_out)


def learn_weights(
    context: Context,
    stacked: StackedModel,
    planned: PlannedStack,
    weighted: WeightedFactors,
    sets: Sequence[DataSet],
    steps: int,
) -> tuple[PlannedStack, int]:
    """The stack with the weights that are learned, with a bar, and the steps that it took; nothing is judged."""
    from stackctl.engine.evaluation.weight_fit import fit_weights, member_weights

    with share_progress(context.output, "learning weights") as progress:
        found = fit_weights(stacked, weighted, sets, steps, lambda step: progress(step / steps))
    made = zip(planned.stack.members, member_weights(weighted, found.weights), strict=True)
    members = tuple(replace(member, **{"layer_weights": {}, **changes}) for member, changes in made)
    return planned.changed(replace(planned.stack, members=members)), found.steps


def _is_nothing(value: float | dict[str, float]) -> bool:
    return all(abs(w) < _NEXT_TO_NOTHING for w in (value.values() if isinstance(value, dict) else [value]))


def _notes(fit: dict[str, Any], judged: Judged) -> list[str]:
    gap = f"{judged.before:.4f} to {judged.after:.4f} on {fit['held_out_records']} held-out records"
    chance = f"p = {judged.p_value:.2g}"
    notes = [f"the learned weights are taken: the loss goes from {gap}, {chance}"]
    if not fit["fitted"]:
        notes = [f"the typed weights are kept: with the learned ones the loss goes from {gap}, {chance}"]
        notes += too_few(fit["held_out_records"])
    notes += [f"{name} has next to no weight and can be left out" for name in fit["leave_out"]]
    return notes


def too_few(records: int) -> list[str]:
    """A note where there are too few held-out records for the test to find anything."""
    note = f"fewer than {_FEWEST} held-out records cannot show that anything is better than by chance"
    return [note] if records < _FEWEST else []


def fit_lines(fit: dict[str, Any]) -> list[str]:
    """What a person reads of the learned weights, a line for each member."""
    lines = []
    for name, value in fit["tried"]["weights"].items():
        if isinstance(value, dict):
            numbers = sorted(value.values())
            middle = numbers[len(numbers) // 2]
            text = f"{len(numbers)} weights from {numbers[0]:.3g} to {numbers[-1]:.3g}, half of them below {middle:.3g}"
        else:
            text = format_weight(value)
        lines.append(f"learned for {name}: {text}")
    return lines
