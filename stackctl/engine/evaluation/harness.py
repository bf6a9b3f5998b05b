"""Tasks of lm-evaluation-harness, put to a base with one stack after another folded in.

The harness keeps what it is there for: the tasks, their prompts, metrics and errors. It gets the model in memory
through its own class for transformers' models (https://github.com/EleutherAI/lm-evaluation-harness).
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import (
    Failed,
    HubFailure,
    Incompatible,
    NotFound,
    StackctlError,
    Usage,
    did_you_mean,
    first_line,
    raise_all,
)
from stackctl.engine.generation.padding import can_pad
from stackctl.engine.libraries import off_stdout, quiet_libraries, replaced
from stackctl.engine.models import StackedModel

_SUFFIXES = (".yaml", ".yml")
_RESAMPLES = 1_000
"""How often the harness draws records again for the error of a metric that is no mean."""


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

    @property
    def label(self) -> str:
        """The metric, with the filter where there is one."""
        return self.metric if self.filter == "none" else f"{self.metric} ({self.filter})"


@dataclass
class Harness:
    """Tasks that are ready, with their data, to be put to a model.

    ``limit`` is how many records of each task count, None for all.
    """

    label: str
    tasks: dict[str, Any]
    groups: dict[str, Any]
    limit: int | None
    batch_size: int
    _model: Any = None

    def attach(self, stacked: StackedModel) -> None:
        """Hand over the base as it was loaded: later would be too late, for the harness ties its embeddings again."""
        with _apart():
            from lm_eval.models.huggingface import HFLM

            size = self.batch_size if can_pad(stacked.model) else 1
            self._model = HFLM(pretrained=stacked.model, tokenizer=stacked.tokenizer, batch_size=size)

    def score(self, stack: str) -> list[TaskScore]:
        """What the model, as it stands, makes of every task; ``stack`` is what it is called.

        Raises:
            Failed: the harness failed, or code of a task.
        """
        with _apart():
            import lm_eval

            _seed(self.tasks)
            try:
                found = lm_eval.evaluate(
                    self._model, {"tasks": self.tasks, "groups": self.groups}, limit=self.limit,
                    bootstrap_iters=_RESAMPLES, log_samples=False,
                )  # fmt: skip
            except Exception as error:  # a task is a program of its author's
                raise Failed(
                    f"lm-evaluation-harness failed with {stack} on {self.label} ({_said(error)})",
                    hint="--debug shows where it happened",
                ) from error
        return _scores(stack, found)


def open_tasks(names: Sequence[str], *, limit: int | None, num_fewshot: int | None, batch_size: int) -> Harness:
    """Find tasks by their names or their YAML files, and get their data.

    Raises:
        NotFound: some are not there; all of them are named.
        Usage, HubFailure: one cannot be read, or its data cannot be had.
    """
    quiet_libraries()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with _apart():
        from lm_eval.tasks import TaskManager

        names = list(dict.fromkeys(names))
        manager = TaskManager(include_defaults=not all(map(_is_path, names)))  # to look through thousands takes seconds
        raise_all([problem for name in names if (problem := _missing(name, manager.all_tasks))])
        loaded = {name: _load(manager, name) for name in names}
    tasks: dict[str, Any] = {}
    for asked, found in loaded.items():
        if twice := sorted(tasks.keys() & found["tasks"].keys()):
            raise Usage(f"{asked} has a task that another has, too: {', '.join(twice)}", hint="name it once")
        tasks |= found["tasks"]
    unsafe = [name for name, task in tasks.items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe:
        raise Incompatible(
            f"{', '.join(unsafe)} would run code that the model writes", hint="run it with lm-eval itself, in a sandbox"
        )
    for task in tasks.values():  # by the harness's own rule: a task that says 0 keeps it
        if (own := task.get_config("num_fewshot")) != 0:
            task.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
    groups = {name: group for found in loaded.values() for name, group in found.get("groups", {}).items()}
    return Harness(", ".join(loaded), tasks, groups, limit, batch_size)


def _seed(tasks: dict[str, Any]) -> None:
    """The harness's own seeds, so that every stack gets the same solved examples in the same order."""
    import random

    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _is_path(name: str) -> bool:
    return name.endswith(_SUFFIXES)


def _missing(name: str, known: list[str]) -> StackctlError | None:
    if _is_path(name):
        return None if Path(name).is_file() else NotFound(f"there is no task file {name}", hint="check the path")
    if name in known:
        return None
    hint = did_you_mean(name, known, "lm-eval ls tasks shows what there is")
    return NotFound(f"lm-evaluation-harness has no task '{name}'", hint=hint)


def _load(manager: Any, name: str) -> dict[str, Any]:
    """A task with its data, or a group or tag with all of its tasks."""
    try:
        found: dict[str, Any] = manager.load([name])
    except OSError as error:
        raise HubFailure(
            f"the data of the task {name} could not be had ({_said(error)})",
            hint="check the network, or the paths under data_files where the task file names files",
        ) from error
    except Exception as error:  # a task is a program of its author's
        raise Usage(
            f"the task {name} cannot be used ({_said(error)})", hint="--debug shows where it happened"
        ) from error
    return found


def _scores(stack: str, found: Any) -> list[TaskScore]:
    """The harness's own results, a row for each metric of each task."""
    scores = []
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, picked = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            error = results.get(f"{metric}_stderr,{picked}")
            version = found["versions"].get(task)
            scores.append(
                TaskScore(
                    stack=stack,
                    task=task,
                    metric=metric,
                    filter=picked,
                    value=float(value),
                    standard_error=float(error) if _is_number(error) else None,
                    higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                    records=int(results.get("sample_len") or found["n-samples"][task]["effective"]),
                    num_fewshot=found["n-shot"].get(task),
                    version=None if version is None else str(version),
                )
            )
    return scores


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keep what the harness and its libraries print off stdout, and their bars off what is no terminal.

    Errors by resampling are computed in this process, for a fork of one that has threads may hang.
    """
    from tqdm import tqdm

    start = tqdm.__init__
    os.environ["DISABLE_MULTIPROC"] = "1"

    def begin(self: Any, *args: Any, **options: Any) -> None:
        start(self, *args, **{**options, "disable": options.get("disable") or None})  # None: only on a terminal

    with replaced(tqdm, "__init__", begin), off_stdout():
        yield
