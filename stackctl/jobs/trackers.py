"""``--report-to``: the programs that Trainer reports a run to, whether they are installed, and where their logs lie."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from stackctl.core import Say
from stackctl.core.errors import Usage, attempt_each, did_you_mean
from stackctl.core.train_job import TrainJob
from stackctl.machine.optional_packages import check_installed
from stackctl.registry.store import Registry
from stackctl.registry.versions import next_number

TRACKERS = ("tensorboard", "trackio", "wandb")
_NONE = "none"
_FOLDERS = {"tensorboard": "TENSORBOARD_LOGGING_DIR", "trackio": "TRACKIO_DIR", "wandb": "WANDB_DIR"}
"""What each of them reads its folder from; Trainer has no argument for it."""
_LOOKS = {
    "tensorboard": "tensorboard --logdir {folder}",
    "trackio": "TRACKIO_DIR={folder} trackio show",
    "wandb": "wandb sync {folder}/wandb/offline-run-*",
}
"""How to look at what was reported."""


def parse_trackers(report_to: list[str] | str | None) -> list[str]:
    """``tensorboard,wandb`` to a list; ``none``, which is Trainer's word, to an empty one.

    Raises:
        Usage: a name that is not known.
    """
    names = report_to.split(",") if isinstance(report_to, str) else report_to or []
    found = [name.strip().lower() for name in names if name.strip() and name.strip().lower() != _NONE]
    for name in found:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            raise Usage(f"report_to: '{name}' is not known", hint=did_you_mean(name, TRACKERS, f"known: {known}"))
    return list(dict.fromkeys(found))


def check_trackers(job: TrainJob) -> None:
    """Make sure that all a job reports to is installed.

    Raises:
        Usage, Incompatible: a name is not known, or its package is not installed; all at once.
    """
    attempt_each(check_installed, parse_trackers(job.report_to))


def log_folder(registry: Registry, name: str) -> Path:
    """Where trackers write about the next version of an adapter; a resumed run goes on there."""
    return registry.root / "logs" / name / str(next_number(registry, name))


@contextlib.contextmanager
def tracking(job: TrainJob, folder: Path, say: Say) -> Iterator[None]:
    """Whatever a job reports to writes into ``folder``, unless the environment names another, and says so.

    No login is asked for: without one, wandb stays offline. What these programs print goes to stderr.
    """
    names = parse_trackers(job.report_to)
    if not names:
        yield
        return
    wanted = {_FOLDERS[name]: str(folder) for name in names} | {"WANDB_SILENT": "true", "WANDB_PROJECT": "stackctl"}
    if not (os.environ.get("WANDB_API_KEY") or (Path.home() / ".netrc").is_file()):
        wanted["WANDB_MODE"] = "offline"
    for name in names:
        where = os.environ.get(_FOLDERS[name], folder)
        say(f"{name} reports into {where}: {_LOOKS[name].format(folder=where)}")
    added = {key: value for key, value in wanted.items() if key not in os.environ}
    os.environ.update(added)
    if str(folder) in added.values():
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for key in added:
            os.environ.pop(key, None)
