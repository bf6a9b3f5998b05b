"""A run that went wrong is told from one that went well by the losses of its steps."""

from __future__ import annotations

import math
import random

import pytest

from stackctl.core.train_job import TrainJob
from stackctl.jobs.run_problems import loss_problem, problems_of_run

SMOLLM2 = 49_152
GUESS = math.log(SMOLLM2)


def noisy(begin: float, end: float, steps: int, deviation: float, seed: int = 0) -> list[float]:
    """Losses that go from one value to another, each off by what its own records make of it."""
    draw = random.Random(seed)
    return [
        max(0.01, begin + (end - begin) * step / max(steps - 1, 1) + draw.gauss(0, deviation)) for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("losses", "vocabulary", "code"),
    [
        ([2.63, 35.8, 18.0, 12.0, 11.2, 10.9, 10.81, 10.803, 10.803, 10.803], SMOLLM2, "uniform_guess"),
        ([2.63, 35.8, 41.0, 39.0, 38.2], SMOLLM2, "uniform_guess"),
        ([2.6] * 10 + [35.0] * 5 + [6.0] * 85, SMOLLM2, "loss_rose"),
        ([2.6, 2.2, 1.9, 1.8, 1.7, 1.6, 1.6, 1.5, 9.0, 8.7, 8.8], SMOLLM2, "loss_rose"),
        ([3.36, 5.95, 6.08, 5.51, 5.16], 260, "loss_rose"),
        ([3.364, 5.9, 5.6], 260, "uniform_guess"),
        ([2.6, 2.4, math.nan, math.nan], SMOLLM2, "loss_not_finite"),
        ([2.6, math.inf], SMOLLM2, "loss_not_finite"),
        ([2.6, 4.9], SMOLLM2, None),  # two batches may be as unlike as that
        ([2.6, 7.9], SMOLLM2, "loss_rose"),
        ([0.693, 2.1, 5.0, 4.0, 4.2, 4.1], None, "loss_rose"),  # pairs, which begin at ln 2
    ],
)
def test_what_went_wrong(losses: list[float], vocabulary: int | None, code: str | None) -> None:
    found = loss_problem(losses, vocabulary)
    assert (found[0] if found else None) == code


@pytest.mark.parametrize(
    ("losses", "vocabulary"),
    [
        ([5.63, 5.70, 5.66, 5.74], 260),  # a random model over 260 tokens begins at a guess, and a little above
        ([5.56, 5.56, 5.56], 260),
        ([5.40, 5.61, 5.55], 260),
        ([5.56, 5.9, 5.6], 260),
        ([10.80, 10.81, 10.80, 10.85], SMOLLM2),
        ([2.6], SMOLLM2),
        ([], SMOLLM2),
        ([2.63, 2.61, 2.7, 2.58], SMOLLM2),
        ([2.6, 3.4, 3.1, 2.5, 2.2, 2.0, 1.9, 1.9, 1.8, 1.8], SMOLLM2),  # a hot start that comes down
        ([0.02, 0.3, 0.05, 0.2, 0.1, 0.04, 0.2], SMOLLM2),
    ],
)
def test_no_false_alarm(losses: list[float], vocabulary: int) -> None:
    assert loss_problem(losses, vocabulary) is None


@pytest.mark.parametrize("steps", [2, 3, 5, 8, 12, 30, 200])
@pytest.mark.parametrize(("deviation", "alarms"), [(0.1, 0), (0.25, 2), (0.4, 12), (0.7, 32)])
def test_records_that_are_unlike_raise_no_alarm(steps: int, deviation: float, alarms: int) -> None:
    """Of 400 runs that learn little and whose steps differ by their records, no more than so many are called wrong."""
    runs = (noisy(2.6, 2.5, steps, deviation, seed) for seed in range(400))
    assert sum(loss_problem(losses, SMOLLM2) is not None for losses in runs) <= alarms


@pytest.mark.parametrize("steps", [5, 12, 30, 200])
@pytest.mark.parametrize("deviation", [0.05, 0.4])
def test_a_rise_is_found_among_noise(steps: int, deviation: float) -> None:
    found = sum(loss_problem(noisy(2.6, 5.6, steps, deviation, seed), SMOLLM2) is not None for seed in range(100))
    assert found >= 95


def test_the_rate_is_the_first_thing_to_change() -> None:
    found = problems_of_run(TrainJob(learning_rate=500.0), [2.63, 35.8, 10.803], SMOLLM2, None)
    assert [problem.code for problem in found] == ["uniform_guess"]
    assert f"from 2.630 to 10.803: that of a guess among all 49,152 tokens ({GUESS:.3f})" in found[0].message
    assert "--learning-rate 0.0002 (it was 500)" in found[0].hint
    lower = problems_of_run(TrainJob(learning_rate=1e-4), [2.63, 35.8, 10.803], SMOLLM2, None)
    assert "--learning-rate 1e-05" in lower[0].hint


def test_weights_of_an_earlier_step_are_named() -> None:
    found = problems_of_run(TrainJob(), [2.0, 1.9, 30.0, 31.0, 32.0], SMOLLM2, kept_step=2)
    assert "the weights of step 2" in found[0].message
    assert "weights of step" not in problems_of_run(TrainJob(), [2.0, 30.0, 31.0], SMOLLM2, kept_step=3)[0].message


def test_losses_of_pairs_are_no_guesses_among_tokens() -> None:
    rising = [0.69, 0.7, 5.6, 5.6, 5.6, 5.6]
    assert [p.code for p in problems_of_run(TrainJob(objective="dpo"), rising, 260, None)] == ["loss_rose"]
