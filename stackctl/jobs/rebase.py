"""``rebase``: a job whose adapter stands on something new begins at its own newest version, not at nothing."""

from __future__ import annotations

from dataclasses import replace

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.train_job import TrainJob
from stackctl.jobs.former import outcome, settings_of, stands_on
from stackctl.registry.checkpoint_files import has_files
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry

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
    known, wanted = outcome(settings_of(name, newest)), outcome(job.settings())
    same = newest.settings is None or all(known[key] == wanted[key] for key in _SHAPE)
    return f"{name}@{newest.version}" if same else None
