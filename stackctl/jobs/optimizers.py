"""``--optimizer``: what it asks for, and what of that can be told before anything is loaded."""

from __future__ import annotations

from stackctl.core.train_job import TrainJob
from stackctl.machine.optional_packages import check_installed

TRAINERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
"""What transformers' Trainer calls each."""
EIGHT_BITS = ("adamw-8bit", "paged-adamw-8bit")
"""Those that bitsandbytes has."""


def check_package(job: TrainJob) -> None:
    """Make sure that the package of a job's optimizer is installed.

    Raises:
        Incompatible: it is not.
    """
    if job.optimizer in EIGHT_BITS:
        check_installed("bitsandbytes", f"--optimizer {job.optimizer}")
