"""The steps that a dry run tells are those that Trainer takes."""

from __future__ import annotations

import pytest

from stackctl.core.train_job import TrainJob
from stackctl.jobs.job import optimizer_steps


def steps(rows: int, processes: int = 1, **settings: object) -> int:
    return optimizer_steps(TrainJob(data="x", **settings), rows, processes)  # type: ignore[arg-type]


def test_a_part_of_an_epoch_counts_as_far_as_a_step_that_has_begun() -> None:
    assert steps(80, batch_size=8, epochs=1.23) == 13


@pytest.mark.parametrize(
    ("rows", "processes", "settings", "wanted"),
    [
        (80, 1, {"batch_size": 8, "epochs": 1.0}, 10),
        (81, 1, {"batch_size": 8, "epochs": 1.0}, 11),
        (81, 1, {"batch_size": 8, "epochs": 2.0, "gradient_accumulation": 4}, 6),
        (81, 2, {"batch_size": 4, "epochs": 1.0}, 11),
        (5, 4, {"batch_size": 8, "epochs": 0.1}, 1),
        (80, 1, {"batch_size": 8, "epochs": 3.0, "max_steps": 7}, 7),
    ],
)
def test_batches_accumulation_and_processes(rows: int, processes: int, settings: dict[str, float], wanted: int) -> None:
    assert steps(rows, processes, **settings) == wanted
