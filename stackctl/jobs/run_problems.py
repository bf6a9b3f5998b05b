"""Whether a training went wrong, by the losses of its steps; pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from stackctl.core.provenance import EntryProblem
from stackctl.core.train_job import TrainJob

_LEAST_RISE = 0.5
_LEAST_SHARE = 0.1
"""Nats, and a share of the beginning, above which a loss has risen; batches differ by less when nothing is wrong."""
_DEVIATIONS = 2.0
"""Standard deviations of a step's loss that a rise has to exceed, where it is not past all doubt."""
_USUAL_NOISE = 0.4
"""The least that is taken for that deviation (nats): a few steps tell it badly."""
_FEWEST = 5
"""Steps from which on it can be told; before, a loss has risen where it doubled and more."""
_SURE_RISE = 2.0
_AT_GUESS = 0.98
"""Share of ln V from which on a loss is that of a uniform guess, and below which (well) it must have begun."""
_WELL_BELOW = 0.9
_USUAL_RATE = 2e-4


def loss_problem(losses: Sequence[float], vocabulary_size: int | None) -> tuple[str, str] | None:
    """What is wrong with a run, as a code and a sentence: None where it went as trainings go.

    The beginning is the first step, which was computed before anything was learned, or the mean of the first tenth
    where that is lower; the end is the mean of the last tenth.

    Args:
        losses: of each optimizer step, in nats.
        vocabulary_size: V, where a loss is a cross-entropy over so many tokens; else None.
    """
    broken = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if broken is not None:
        return "loss_not_finite", f"the loss of step {broken} is not a finite number"
    if len(losses) < 2:
        return None
    tenth = max(1, len(losses) // 10)
    begins = min(losses[0], _mean(losses[:tenth]))
    ends = _mean(losses[-tenth:])
    moved = f"the loss went from {begins:.3f} to {ends:.3f}"
    guess = math.log(vocabulary_size) if vocabulary_size and vocabulary_size > 1 else math.inf
    if begins < _WELL_BELOW * guess and ends >= _AT_GUESS * guess:
        worse = "worse than" if ends * _AT_GUESS > guess else "that of"
        return "uniform_guess", f"{moved}: {worse} a guess among all {vocabulary_size:,} tokens ({guess:.3f})"
    if _has_risen(losses, begins, ends):
        return "loss_rose", f"{moved}: it ends above its beginning"
    return None


def _has_risen(losses: Sequence[float], begins: float, ends: float) -> bool:
    """Whether the end lies above the beginning by more than the records of single steps explain."""
    rise = ends - begins
    least = max(_LEAST_RISE, _LEAST_SHARE * abs(begins))
    tenth, half = len(losses) // 10, len(losses) // 2
    last = losses[-max(tenth, min(3, half)) :]
    if rise <= least or min(last) <= begins + least:
        return False
    if rise > max(_SURE_RISE, begins):
        return True
    deviation = max(_noise(losses[half:]), _USUAL_NOISE) if len(losses) >= _FEWEST else math.inf
    return rise > _DEVIATIONS * deviation * math.sqrt(1 + 1 / len(last))


def _noise(losses: Sequence[float]) -> float:
    """The standard deviation from step to step (nats), by neighbours, so that a trend does not count."""
    return math.sqrt(_mean([(b - a) ** 2 / 2 for a, b in itertools.pairwise(losses)]))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def problems_of_run(
    job: TrainJob, losses: Sequence[float], vocabulary_size: int, kept_step: int | None
) -> list[EntryProblem]:
    """What an entry says of a run that went wrong, with the rate as the first thing to change.

    ``kept_step`` is the step whose weights are registered, where held-out records chose it.
    """
    found = loss_problem(losses, vocabulary_size if job.objective == "sft" else None)
    if found is None:
        return []
    code, message = found
    if kept_step is not None and kept_step != len(losses):
        message += f"; registered are the weights of step {kept_step}, the best on the held-out records"
    rate = min(job.learning_rate / 10, _USUAL_RATE)
    hint = f"first of all lower the rate: train it again with --learning-rate {rate:.3g} (it was {job.learning_rate:g})"
    return [EntryProblem(code=code, message=message, hint=hint)]
