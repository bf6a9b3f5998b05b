"""The count of steps against Trainer's own, over many sizes."""

from __future__ import annotations

import itertools

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from stackctl.core.train_job import TrainJob
from stackctl.engine.training.trainer import _warmup_steps
from stackctl.jobs.job import optimizer_steps


def test_it_is_trainers(tmp_path: object) -> None:
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
    )
    for rows, batch, accumulation, epochs in itertools.product(
        (1, 7, 8, 80, 81), (1, 3, 8), (1, 2, 4), (0.1, 1.0, 1.1, 1.23, 3.0)
    ):
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
            num_train_epochs=epochs, use_cpu=True, report_to="none",
        )  # fmt: skip
        loader = DataLoader(list(range(rows)), batch_size=batch)
        wanted = trainer.set_initial_training_values(arguments, loader)[-1]
        job = TrainJob(data="x", batch_size=batch, gradient_accumulation=accumulation, epochs=epochs)
        assert optimizer_steps(job, rows, 1) == wanted, (rows, batch, accumulation, epochs)


def test_a_share_of_steps_is_rounded_down_and_some_are_left() -> None:
    wanted = {(0.03, 18): 0, (0.03, 100): 3, (0.29, 100): 29, (0.57, 100): 57, (0.9, 1): 0, (5, 40): 5, (40, 40): 39}
    assert {(share, n): _warmup_steps(TrainJob(data="x", warmup=share), n) for share, n in wanted} == wanted
