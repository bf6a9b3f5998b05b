"""``--from REF``: a job that begins at another adapter's factors, checked by its header before anything is loaded.

With ``rebase`` that is its own newest version, once what is beneath it is another.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from stackctl.core.errors import Incompatible, StackctlError, Usage, attempt, gathering, raise_all
from stackctl.core.expressions import format_expression, parse_expression
from stackctl.core.train_job import TrainJob
from stackctl.jobs.former_training import Former, comparable_settings, find_former, settings_of, stands_on
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.lora.target_modules import named_targets
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.registry.adapters import ResolvedMember, foundations, resolve_adapter
from stackctl.registry.checkpoint_files import has_files
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry


@dataclass(frozen=True)
class Beginning:
    """Where a job begins: an adapter version, planned alone on the job's base."""

    member: ResolvedMember
    plan: StackPlan
    former: Former | str | None = None
    """Where it stood before, if that was elsewhere; or why that cannot be told."""

    @property
    def label(self) -> str:
        return self.member.label

    @property
    def config(self) -> dict[str, Any]:
        return self.plan.members[0].checkpoint.config

    @property
    def patterns(self) -> dict[str, Any]:
        """Ranks and alphas of its own that single modules have, as LoraConfig takes them."""
        return {key: self.config[key] for key in ("rank_pattern", "alpha_pattern") if self.config.get(key)}


def find_beginning(registry: Registry, name: str, job: TrainJob, stack: ResolvedStack) -> tuple[Beginning, TrainJob]:
    """The adapter that a job begins at, and the job with what that one decides, see :func:`settle`.

    Raises:
        Usage: it is no single adapter, or stands on what is trained, or beneath it, or is asked to be another.
        NotFound, Incompatible, VerificationFailed: it is not there, does not fit the base, or is no plain LoRA.
    """
    assert job.from_ is not None, "only asked for where a job begins at something"
    terms = parse_expression(job.from_)
    if len(terms) != 1 or terms[0].weight != 1:
        raise Usage(f"--from {job.from_} is not a single adapter", hint="name one, for example --from style@1")
    member = resolve_adapter(registry, terms[0].reference)
    problems: list[StackctlError] = []
    if any(below.adapter.name == member.adapter.name for below in stack.members):
        what = f"--from {member.label} would stand on itself: {stack.pinned} holds {member.adapter.name} already"
        problems.append(Usage(what, hint=f"leave {member.adapter.name} out of --on, or begin at another adapter"))
    elif member.adapter.name != name and any(term.reference.name == name for term in foundations(member.version)):
        below = format_expression(foundations(member.version))
        what = f"--from {member.label} would stand on itself: it was trained on {below}"
        problems.append(Usage(what, hint=f"choose another name for what comes of it, for example {name}-2"))
    with gathering(problems):
        beginning = Beginning(member, _plan_alone(registry, member, stack), find_former(registry, member, stack))
        job = settle(job, beginning)
    raise_all(problems)
    return beginning, job


def _plan_alone(registry: Registry, member: ResolvedMember, stack: ResolvedStack) -> StackPlan:
    """An adapter alone on the base of a stack, where it can be begun at."""
    problems: list[StackctlError] = []
    checkpoint = read_checkpoint(registry.weights_path(member.version))
    plan = plan_stack(stack.base, [PlanMember(member.label, 1.0, checkpoint, member.adapter.name)])
    with gathering(problems):
        plan.check()
    if plan.replacements:
        what = f"--from {member.label}: it carries {plan.replacements[0].parameter} whole, which is not trained on"
        problems.append(Incompatible(what, hint="begin at an adapter without modules_to_save and biases"))
    if any(module.is_experts for module in plan.modules.values()):
        what = f"--from {member.label}: it stands on experts, whose factors cannot be begun at"
        problems.append(Incompatible(what, hint="leave out --from, or begin at an adapter on plain layers"))
    raise_all(problems)
    return plan


def settle(job: TrainJob, beginning: Beginning) -> TrainJob:
    """A job whose rank, alpha, targets and kind of scaling are those of what it begins at, where it says nothing else.

    With a higher rank alpha grows along, so that the scaling stays what it was.

    Raises:
        Usage, Incompatible: it asks for a lower rank, for other targets, or to be orthogonal to the stack.
    """
    config, label = beginning.config, beginning.label
    own_rank = int(config.get("r", 8))
    own_alpha = float(config.get("lora_alpha", 8))
    rank = job.rank or own_rank
    problems: list[StackctlError] = []
    if rank < own_rank:
        what = f"--rank {rank}: {label} has rank {own_rank}, and a rank can only be raised"
        problems.append(Usage(what, hint="leave it out"))
    if rank > own_rank and beginning.patterns:
        what = f"--rank {rank}: modules of {label} have ranks or alphas of their own"
        problems.append(Incompatible(what, hint="leave out --rank"))
    if job.orthogonal:
        what = f"--orthogonal would change where --from {label} begins"
        problems.append(Usage(what, hint="leave out one of the two"))
    targets = attempt(problems, _targets, job, beginning)
    raise_all(problems)
    grown = rank / own_rank
    alpha = job.alpha or own_alpha * (grown**0.5 if config.get("use_rslora") else grown)
    if not alpha or 0 in (config.get("alpha_pattern") or {}).values():
        hint = "begin at another adapter" if alpha else "give it one with --alpha, or begin at another adapter"
        raise Incompatible(f"--from {label}: its alpha is 0, with which it has no effect and learns nothing", hint=hint)
    rslora = bool(config.get("use_rslora")) or job.use_rslora
    return msgspec.structs.replace(job, rank=rank, alpha=alpha, use_rslora=rslora, target_modules=targets)


def _targets(job: TrainJob, beginning: Beginning) -> list[str] | str:
    """What the adapter stands on, in the words of its training or its own where they mean that here, else by names."""
    base = beginning.plan.known_base
    own = set(beginning.plan.modules)
    if job.target_modules != TrainJob().target_modules and named_targets(job.target_modules, base) != own:
        raise Incompatible(
            f"target_modules: {beginning.label} stands on other modules than {job.target_modules}",
            hint="leave out --target-modules: they are those of --from",
        )
    version = beginning.member.version
    said = (version.settings or {}).get("target_modules")
    if isinstance(said, list | str) and (version.fingerprint == base.fingerprint or named_targets(said, base) == own):
        return said
    told = beginning.config.get("target_modules")
    if isinstance(told, list) and named_targets(told, base) == own:
        return sorted(told)
    return sorted(own)


_SHAPE = ("rank", "alpha", "use_rslora", "target_modules", "train_tokens")
"""Settings that make an adapter another one, which begins at nothing."""


def begin_at_own(registry: Registry, name: str, job: TrainJob, stack: ResolvedStack) -> tuple[TrainJob, ResolvedStack]:
    """The job with its ``from`` settled, and the stack with a note on where it begins.

    Raises:
        Usage: it is told to begin elsewhere, or to be orthogonal to the stack.
    """
    if job.from_:
        raise Usage(
            f"rebase begins at the newest version of '{name}', and from at {job.from_}", hint="leave out one of the two"
        )
    if job.orthogonal:
        raise Usage("orthogonal would change where rebase begins", hint="leave out one of the two")
    plain = msgspec.structs.replace(job, rebase=False)
    adapter = registry.find_adapter(name)
    if adapter is None:
        return plain, stack
    newest = adapter.newest()
    label = own_newest(registry, name, job)
    if label is None:
        note = f"{name}@{newest.version} is another kind of adapter by its settings, or its weights are gone"
    elif stands_on(registry, newest, stack):
        note = f"{label} stands on just this"
    else:
        was = "+".join(newest.trained_on) or "the bare base"
        was += f" of {newest.base}" if newest.fingerprint != stack.base.fingerprint else ""
        note = f"{label} was trained on {was}; on {stack.pinned} it begins where that one stands"
        job = msgspec.structs.replace(plain, from_=label, rank=job.effective_rank(), alpha=job.effective_alpha())
        return job, replace(stack, notes=(*stack.notes, note))
    return plain, replace(stack, notes=(*stack.notes, f"{note}: it begins at nothing"))


def own_newest(registry: Registry, name: str, job: TrainJob) -> str | None:
    """The newest version of an adapter where a job can begin at it: the same kind of adapter, its weights there."""
    adapter = registry.find_adapter(name)
    if adapter is None or not has_files(registry, adapter.newest()):
        return None
    newest = adapter.newest()
    known, wanted = comparable_settings(settings_of(name, newest)), comparable_settings(job.settings())
    same = newest.settings is None or all(known[key] == wanted[key] for key in _SHAPE)
    return f"{name}@{newest.version}" if same else None
