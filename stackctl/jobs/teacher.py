"""``--objective distil``: whose probabilities a job learns, checked by headers before anything is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from stackctl.core.errors import Incompatible, StackctlError, Usage, attempt, raise_all
from stackctl.core.expressions import BASE
from stackctl.core.train_job import TrainJob
from stackctl.jobs.trained_tokens import asks
from stackctl.lora.target_modules import expand_modules, named_targets, natural_order
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.planning import PlannedStack, plan_expression
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry
from stackctl.storage.paths import missing_path, typed_path
from stackctl.storage.yaml_files import read_text


@dataclass(frozen=True)
class Teacher:
    """A stack on the bare base, whose probabilities are learned; ``system`` is the system prompt that it reads."""

    stack: ResolvedStack
    plan: StackPlan
    system: str | None = None

    @property
    def label(self) -> str:
        """The stack as an expression, pinned; ``base`` of a bare one."""
        return self.stack.expression

    @property
    def system_digest(self) -> str | None:
        return None if self.system is None else "sha256:" + hashlib.sha256(self.system.encode()).hexdigest()

    def signature(self) -> list[Any]:
        """What decides what it says, by digests."""
        members = [[m.version.digest, m.weight, dict(m.layer_weights)] for m in self.stack.members]
        return [members, self.system_digest]


def find_teacher(
    registry: Registry, job: TrainJob, folder: Path | None, *, fresh: bool = False
) -> tuple[Teacher, TrainJob]:
    """The teacher of a job that distils, and the job on its base and on its modules, unless it names more of these.

    Raises:
        StackctlError: everything that keeps it from being taught, at once.
    """
    problems: list[StackctlError] = [*_unfit(job)]
    system = attempt(problems, _read_system, job.system, folder) if job.system is not None else None
    planned: PlannedStack | None = None
    if job.teacher is None:
        problems.append(Usage("--objective distil needs a teacher", hint="name a stack: --teacher STACK"))
    elif planned := attempt(problems, plan_expression, registry, job.teacher, base=job.base, fresh=fresh):
        problems += _no_lora_says(planned.plan)
        factors = (factor for module in planned.plan.modules.values() for factor in module.factors)
        if not any(factor.weight for factor in factors) and not job.system:
            what = f"--teacher {job.teacher} says what the bare base says: there is nothing to distil"
            problems.append(Usage(what, hint="name a stack, or give it a system prompt: --system FILE"))
        job = attempt(problems, _settled, job, planned.plan) or job
    raise_all(problems)
    assert planned is not None, "what could not be found was raised"
    return Teacher(*planned, system), msgspec.structs.replace(job, base=planned.stack.base.name)


def _unfit(job: TrainJob) -> Iterator[Usage]:
    """What a job that distils cannot do besides."""
    if job.on not in (None, BASE):
        yield Usage(f"--on {job.on}: what is distilled stands on the bare base", hint="leave out --on")
    if job.from_ is not None or job.rebase:
        what = "--from and --rebase: what is distilled begins at the best pair of its rank for the teacher"
        yield Usage(what, hint="leave them out")
    if asks(job.train_tokens):
        yield Usage("--train-tokens: what is distilled is factors, and no rows of single tokens", hint="leave it out")


def _no_lora_says(plan: StackPlan) -> Iterator[Incompatible]:
    """What a teacher has that no LoRA beside the base could say."""
    if plan.method != SUM:
        what = f"a stack composed by {plan.method} is not a sum, and only a sum is kept beside the base"
        yield Incompatible(f"--teacher: {what}", hint="name a sum")
    for kind, parts in (
        ("whole modules", plan.whole_modules),
        ("trained biases", plan.trained_biases),
        ("rows of single tokens", plan.token_rows),
    ):
        for label in [plan.members[number].label for number in sorted({part.member for part in parts})]:
            what = f"{label} carries {kind}, which no LoRA can say"
            yield Incompatible(f"--teacher: {what}", hint="distil a stack without it")
    if experts := [name for name, module in plan.modules.items() if module.is_experts]:
        what = f"it stands on experts ({experts[0]}), whose factors cannot be begun at"
        yield Incompatible(f"--teacher: {what}", hint="distil a stack without them")


def _settled(job: TrainJob, plan: StackPlan) -> TrainJob:
    """The job on the modules of its teacher, where it names none; a rank that is one.

    Raises:
        Usage, Incompatible: it leaves out some of them, or no module has as many directions.
    """
    base = plan.known_base
    known, problems = expand_modules(base.modules), list[StackctlError]()
    own, asked = set(plan.modules), named_targets(job.target_modules, base)
    if own and job.target_modules == TrainJob().target_modules:
        if asked != own:
            job = msgspec.structs.replace(job, target_modules=sorted(own, key=natural_order))
    elif missing := own - asked:
        what = f"target_modules: the teacher stands on {len(missing)} modules more, {min(missing, key=natural_order)}"
        problems.append(Incompatible(what, hint="leave out --target-modules: they are the teacher's"))
    shapes = [known[name].shape for name in (plan.modules or known)]
    most = max((min(shape[-2:]) for shape in shapes if len(shape) >= 2), default=job.effective_rank())
    if job.effective_rank() > most:
        what = f"--rank {job.effective_rank()}: no module of the teacher has more than {most} directions"
        problems.append(Usage(what, hint=f"use a rank of at most {most}"))
    raise_all(problems)
    return job


def _read_system(text: str, folder: Path | None) -> str:
    """A system prompt out of its file, without white space around it.

    Raises:
        NotFound, Usage: it is not there, is no text, or is empty.
    """
    path = typed_path(text, folder, "--system")
    if not path.exists():
        raise missing_path(path, "the system prompt")
    found = read_text(path).strip()
    if not found:
        raise Usage(f"the system prompt {path} is empty", hint="write into it what the teacher is told")
    return found
