"""One training job, checked as far as it can be without loading anything.

A :class:`PreparedJob` is what the engine trains.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stackctl.core import errors
from stackctl.core.errors import StackctlError, raise_all
from stackctl.core.expressions import BASE
from stackctl.core.schema import Base
from stackctl.core.template_arguments import check_recorded, template_arguments
from stackctl.core.train_job import TrainJob
from stackctl.jobs import ranks
from stackctl.jobs.beginning import Beginning, begin_at_own, find_beginning
from stackctl.jobs.job_checks import (
    check_is_sum,
    check_not_on_itself,
    check_optimizer,
    check_orthogonal,
    check_precision,
    check_targets,
    contradictions,
    data_path,
)
from stackctl.jobs.micro_batches import AUTO
from stackctl.jobs.teacher import Teacher, find_teacher
from stackctl.jobs.trackers import check_trackers
from stackctl.jobs.trained_tokens import asks, check_tokens
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.registry.versions import check_adapter_name


@dataclass(frozen=True)
class PreparedJob:
    """A job whose names are resolved and whose settings fit the base."""

    name: str
    job: TrainJob
    stack: ResolvedStack
    plan: StackPlan
    data: str
    eval_data: str | None
    beginning: Beginning | None = None
    auto_batch: bool = False
    """Whether a step may be cut into smaller micro-batches than the job's, where memory asks for it."""
    teacher: Teacher | None = None
    """Whose probabilities are learned, with the objective distil."""

    @property
    def base(self) -> Base:
        return self.stack.base

    @property
    def stays_live(self) -> bool:
        """Whether the frozen stack is attached beside the base in any case, and nothing of it folded.

        Four bits have no room for a delta. Otherwise ``frozen: auto`` folds, and keeps a stack live only when folding
        turns out to lose too much of it.
        """
        return bool(self.plan.modules) and (self.job.frozen == "live" or self.job.dtype == "nf4")

    @property
    def trains_tokens(self) -> bool:
        """Whether it may train rows of single tokens: its own, or those of what it begins at."""
        return asks(self.job.train_tokens) or bool(self.beginning and self.beginning.plan.token_rows)

    @property
    def trained_on(self) -> list[str]:
        """The frozen stack as terms, pinned: ``["style@1"]``."""
        return self.stack.terms()

    @property
    def initial_seed(self) -> int:
        """The seed of the new factors A: the job's own on a bare base, on a frozen stack another for each stack.

        Factors that are drawn with one seed read nearly the same directions, and members of a stack must not.
        """
        if not self.stack.members:
            return self.job.seed
        below = [[member.version.digest, float(member.weight)] for member in self.stack.members]
        text = json.dumps([self.job.seed, below], separators=(",", ":"))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def stands_on(self) -> list[Any]:
        """What is frozen in a run, by digests: the base, its precision, and the members with their weights."""
        members = [[m.version.digest, m.weight, dict(m.layer_weights)] for m in self.stack.members]
        return [self.base.fingerprint, self.job.dtype, members]

    def signature(self, data_digest: str, eval_digest: str | None) -> dict[str, Any]:
        """Everything that decides what comes out: equal signatures mean nothing would change."""
        return {
            "settings": msgspec.to_builtins(self.job.settings()),
            "data": data_digest,
            "held-out data": eval_digest,
            "base": self.base.fingerprint,
            "tokenizer": self.base.tokenizer,
            "chat template": self.base.chat_template,
            "on": [[m.label, m.version.digest, m.weight] for m in self.stack.members],
            "from": [self.beginning.label, self.beginning.member.version.digest] if self.beginning else None,
            "processes": ranks.world_size(),
        } | ({"teacher": self.teacher.signature()} if self.teacher else {})


def prepare_job(
    registry: Registry,
    name: str,
    job: TrainJob,
    *,
    folder: Path | None = None,
    fresh: bool = False,
    auto_batch: bool = False,
) -> PreparedJob:
    """Resolve and check a job; paths of data are relative to ``folder`` (default: the working directory).

    ``fresh`` takes the newest versions even where ``on`` is also what a stored stack is called, as a recipe means it.
    ``auto_batch`` leaves open how a step of the job's batch size is cut, as ``batch_size: auto`` does with the default.

    Raises:
        StackctlError: everything that is wrong with it, at once.
    """
    auto_batch = auto_batch or job.batch_size == AUTO
    job = msgspec.structs.replace(job, batch_size=job.effective_batch_size())
    problems: list[StackctlError] = []
    beginning: Beginning | None = None
    attempt = functools.partial(errors.attempt, problems)
    attempt(check_adapter_name, registry, name)
    teacher: Teacher | None = None
    distils = job.objective == "distil"
    if distils and (taught := attempt(find_teacher, registry, job, folder, fresh=fresh)):
        teacher, job = taught
    on = BASE if job.on is None else job.on
    stack: Any = None
    if teacher or not distils:
        stack = attempt(resolve_expression, registry, on, base=job.base, fresh=fresh)
    plan = attempt(lambda: read_plan(registry, stack).check()) if stack else None
    data = attempt(data_path, job.data, folder, name)
    eval_data = attempt(data_path, job.eval_data, folder, name) if job.eval_data else None
    if stack:
        attempt(check_is_sum, stack)
        attempt(stack.terms)
        attempt(check_not_on_itself, name, stack)
        if job.rebase and (rebased := attempt(begin_at_own, registry, name, job, stack)):
            job, stack = rebased
        if job.from_ is not None and (begun := attempt(find_beginning, registry, name, job, stack)):
            beginning, job = begun
        attempt(check_targets, job, stack.base)
    if stack and (arguments := attempt(_template_arguments, job, stack.base)) is not None:
        job = arguments
    if plan and job.orthogonal:
        attempt(check_orthogonal, job, plan)
    if plan and stack:
        attempt(check_tokens, job, plan, stack.base, beginning.plan if beginning else None)
    problems += contradictions(job)
    for check in (check_precision, check_optimizer, check_trackers):
        attempt(check, job)
    raise_all(problems)
    assert plan is not None, "a plan that could not be made is a problem, and those were raised"
    return PreparedJob(name, job, stack, plan, data, eval_data, beginning, auto_batch, teacher)


def _template_arguments(job: TrainJob, base: Base) -> TrainJob:
    """A job whose arguments for the chat template are all of them: its own, then the base's."""
    found = template_arguments(job.chat_template_kwargs, job.enable_thinking, base.chat_template_kwargs)
    check_recorded(found)
    thinks = found.get("enable_thinking")
    return msgspec.structs.replace(
        job, chat_template_kwargs=found or None, enable_thinking=thinks if isinstance(thinks, bool) else None
    )


def optimizer_steps(job: TrainJob, rows: int, processes: int) -> int:
    """Optimizer steps of a whole run over ``rows`` records (or packed sequences), as transformers' Trainer counts them.

    An epoch has a step for every full global batch and one for what is left; a part of an epoch counts as far as a
    step that has begun (``Trainer.set_initial_training_values``, transformers 5.23).
    """
    batches = -(-rows // (job.effective_batch_size() * processes))
    return job.max_steps or math.ceil(-(-batches // job.gradient_accumulation) * job.epochs)


def changed_since(known: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two signatures, a setting with its value then and now."""
    before = {"processes": 1, **known}  # runs of a time when there was only one
    changed = [key for key, value in now.items() if key != "settings" and before.get(key) != value]
    was = before.get("settings") or {}
    changed = [f"{key} ({before[key]}, now {now[key]})" if key == "processes" else key for key in changed]
    return [f"{k} ({was.get(k)}, now {v})" for k, v in now["settings"].items() if was.get(k) != v] + changed
