"""What this job will need of this machine's memory: estimated beforehand, and tried where that can be done safely.

An estimate comes near; an allocator that runs out says so, and then the next smaller cut of a step is tried.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import PeftModel

from stackctl.core import Say
from stackctl.core.errors import Failed
from stackctl.engine.at_once import computations_at_once
from stackctl.engine.data.examples import supervised_count
from stackctl.engine.devices import choose_device, choose_dtype, generators_of, multiplies_in_bfloat16
from stackctl.engine.training.dataset import Corpus
from stackctl.engine.training.distributed import is_sharded, keeps_parts, told_by_each
from stackctl.engine.training.preferences import collate_answers
from stackctl.engine.training.targets import Targets
from stackctl.engine.training.trainer import CHECKPOINTING, TrainerParts, micro_batch_loss
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.micro_batches import StepCut, first_that_fits, possible_cuts
from stackctl.lora.target_modules import named_targets
from stackctl.machine.memory_estimate import (
    LargestBatch,
    MemoryEstimate,
    NewAdapter,
    Precision,
    Surroundings,
    estimate_memory,
)
from stackctl.machine.resources import main_memory, own_memory
from stackctl.storage.files import human_bytes

_STATE = 2
"""Values that the optimizer keeps for each that is trained, which it makes in its first step."""
PART = 1536
"""Tokens that go forward and back at once on a CPU, where more of them take memory and save no time."""


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that train together.

    ``checkpoints``: accelerate has activations computed again, whatever the job says. ``is_here``: this process is one
    of them, and what it holds already is part of what a process needs.
    """

    processes: int = 1
    sharded: bool = False
    checkpoints: bool = False
    is_here: bool = True


@dataclass(frozen=True)
class StepPlan:
    """How each step is cut, the memory that this takes, and what of it a person should know."""

    cut: StepCut
    estimate: MemoryEstimate
    notes: tuple[str, ...] = ()
    smaller: tuple[StepCut, ...] = ()
    """The other cuts that could be taken, each needing less than the one before, should this one not fit after all."""

    def told(self) -> list[str]:
        """Lines for a person."""
        return [self.estimate.render(), *(f"note: {note}" for note in self.notes)]


def plan_step(
    prepared: PreparedJob, corpus: Corpus, targets: Targets, group: ProcessGroup, kept: StepCut | None = None
) -> StepPlan:
    """Choose how the steps of a job are cut, by the memory that this takes and that is there.

    ``kept`` is how the run that goes on cut them, which stays.
    """
    job, auto = prepared.job, prepared.auto_batch
    available, shared = _available(group)

    @functools.cache
    def estimate(cut: StepCut) -> MemoryEstimate:
        memory = _estimate(prepared, corpus, len(targets.tokens), group, cut)
        return replace(memory, available=available, shared=shared)

    asked = job.gradient_checkpointing
    checkpointing = False if group.checkpoints else asked if targets.checkpoints else False
    step = StepCut(job.effective_batch_size(), job.gradient_accumulation)
    parted = choose_device().type == "cpu" and not group.sharded and not prepared.teacher
    alone = parted and group.processes == 1 and not keeps_parts()
    fastest = replace(
        step, tokens=PART if parted else None, at_once=computations_at_once() if alone else 1, as_one=alone
    )
    cuts = possible_cuts(fastest, smaller=auto, checkpointing=checkpointing)
    if kept and kept.records * kept.count == step.records * step.count and (auto or kept.records == step.records):
        chosen = replace(kept, checkpointing=kept.checkpointing if checkpointing is None else checkpointing)
        return StepPlan(chosen, estimate(chosen))
    chosen = first_that_fits(cuts, lambda cut: estimate(cut).fits, smaller=auto)
    notes = []
    if auto:
        notes.append(f"--batch-size auto: {step.records * step.count} records a step, in {chosen}")
    if chosen.checkpointing and asked is None:
        plain = estimate(replace(chosen, checkpointing=False))
        notes.append(
            "activations are computed again for the backward pass, which is about a third slower: kept, they would "
            f"make it {human_bytes(plain.total)} of {human_bytes(plain.available)} "
            "(--no-gradient-checkpointing keeps them)"
        )
    return StepPlan(chosen, estimate(chosen), tuple(notes), tuple(cuts[cuts.index(chosen) + 1 :]))


def _available(group: ProcessGroup) -> tuple[int, bool]:
    """Bytes that there are for training, and whether all processes share them; what is held for it already counts."""
    device = choose_device()
    if device.type == "cuda":
        held = torch.cuda.memory_reserved() if group.is_here else 0
        return torch.cuda.mem_get_info(device)[0] + held, False
    return main_memory().available + (own_memory() * group.processes if group.is_here else 0), True


def _largest_part(lengths: np.ndarray, records: int, most: int) -> int:
    """Tokens of the fullest part of at most so many records and ``most`` tokens: the longest that fit, one by one."""
    total, fitting = 0, np.sort(lengths)
    for _ in range(records):
        fitting = fitting[: np.searchsorted(fitting, most - total, side="right")]
        if not len(fitting):
            break
        total, fitting = total + int(fitting[-1]), fitting[:-1]
    return total


def _at_once(lengths: np.ndarray, cut: StepCut) -> int:
    """Tokens that are computed at once at most: of parts, or of the longest record, which is one alone."""
    assert cut.tokens is not None, "else nothing is parted"
    longest = int(lengths.max())
    if cut.at_once == 1:
        return max(_largest_part(lengths, cut.rows, cut.tokens), longest)
    return max(cut.at_once * _largest_part(lengths, cut.rows, cut.beside), longest)


def _estimate(prepared: PreparedJob, corpus: Corpus, rows: int, group: ProcessGroup, cut: StepCut) -> MemoryEstimate:
    """The memory of one process, of the largest micro-batch that the data can make.

    ``rows`` is how many single tokens have theirs trained.
    """
    base, device = prepared.base, choose_device()
    lengths = corpus.rows.lengths()
    largest = largest_rows(corpus, cut.rows)
    tokens = int(lengths[largest].sum())
    supervised = supervised_count(example for row in largest for example in corpus.rows[row])
    if cut.tokens is not None:
        tokens = min(tokens, _at_once(lengths, cut))
        supervised = min(supervised, tokens)
    beside = prepared.teacher.plan if prepared.teacher else prepared.plan if prepared.stays_live else None
    live = max((module.rank for module in beside.modules.values()), default=0) if beside else 0
    targets = named_targets(prepared.job.target_modules, base)
    precision = _precision(prepared, device)
    plain = precision in ("float32", "autocast") and not beside
    fused = plain and device.type == "cpu" and not group.sharded
    return estimate_memory(
        base,
        NewAdapter(
            prepared.job.effective_rank(), targets, live, rows, prepared.job.eight_bits, bool(prepared.job.dropout)
        ),
        LargestBatch(
            tokens, supervised, cut.checkpointing or group.checkpoints, prepared.teacher is not None, cut.at_once
        ),
        Surroundings(precision, group.processes, group.sharded, heap=device.type == "cpu", fused=fused),
    )


def largest_rows(corpus: Corpus, count: int) -> list[int]:
    """The numbers of the ``count`` longest rows, the longest first."""
    return [int(row) for row in corpus.rows.lengths().argsort(kind="stable")[::-1][:count]]


def _precision(prepared: PreparedJob, device: torch.device) -> Precision:
    job, base = prepared.job, prepared.base
    if job.dtype == "nf4":
        return "nf4"
    if choose_dtype(job.dtype, device, base) != torch.float32:
        return "half"
    hidden = next((shape.shape[1] for shape in base.modules.values() if shape.type == "Embedding"), 0)
    return "autocast" if job.dtype == "auto" and multiplies_in_bfloat16(device, hidden) else "float32"


# -- tried on a device, whose allocator says when it runs out --------------------------------------------------------


def runs_out_safely(device: torch.device) -> bool:
    """Whether more than there is can be asked for, with an error as the answer: main memory would end the process.

    Under FSDP each process still holds the whole base here, which says nothing of the run.
    """
    return device.type == "cuda" and not is_sharded()


def memory_full() -> Failed:
    return Failed(
        "the device's memory is full", hint="use --batch-size auto, --gradient-checkpointing, or a smaller --max-length"
    )


def first_that_runs(
    model: PeftModel, corpus: Corpus, parts: TrainerParts, cuts: Sequence[StepCut], say: Say
) -> StepCut:
    """The first of ``cuts`` whose largest micro-batch goes forward and back in this memory, in all processes.

    Raises:
        Failed: not even that of the last one does.
    """
    own = next((number for number, cut in enumerate(cuts) if _runs(model, corpus, parts, cut)), len(cuts))
    number = max(told_by_each(own))
    if number == len(cuts):
        raise memory_full()
    if number:
        say(f"note: {cuts[0]} did not fit when it was tried: it is {cuts[number]}")
    return cuts[number]


def _runs(model: PeftModel, corpus: Corpus, parts: TrainerParts, cut: StepCut) -> bool:
    device = next(model.parameters()).device
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows = corpus.rows.of(parts.answers) if parts.answers else corpus.rows
    batch = collate_answers([rows[row] for row in largest_rows(corpus, cut.rows)], drifts=parts.drifts)
    swapped = batch.pop("swapped", None)  # it is read without a gradient, which takes less
    was_training = model.training
    try:
        state = [torch.empty_like(parameter) for parameter in trained for _ in range(_STATE)]
        inputs = {key: value.to(device) for key, value in batch.items()}
        drift = torch.zeros((), device=device) if swapped is not None else None
        model.train()
        if cut.checkpointing:
            model.gradient_checkpointing_enable(CHECKPOINTING)
        casting = torch.autocast(device.type, torch.bfloat16, enabled=parts.bfloat16)
        with torch.random.fork_rng(generators_of(device)), casting:
            micro_batch_loss(model, inputs, parts, drift)[0].backward()  # type: ignore[no-untyped-call]
        del state
    except torch.OutOfMemoryError:
        return False
    finally:
        if cut.checkpointing:
            model.gradient_checkpointing_disable()
        model.train(was_training)
        for parameter in trained:
            parameter.grad = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
