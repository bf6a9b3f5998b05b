"""Train one adapter on a frozen, active stack, prove it, and register it."""

from __future__ import annotations

import contextlib
import functools
import shutil
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from transformers import set_seed

from stackctl.core.errors import Interrupted, Terminated, Usage
from stackctl.core.schema import AdapterVersion
from stackctl.engine.at_once import AtOnce, keeps_nothing
from stackctl.engine.data.chat_template import choose_chat_template, fix_date, shown_date
from stackctl.engine.data.examples import Example
from stackctl.engine.data.rows import few_tokens
from stackctl.engine.devices import check_kernels, choose_device, computes_in_bfloat16
from stackctl.engine.loss.logits import draws_noise, supervised_loss
from stackctl.engine.loss.row_layout import choose_layout
from stackctl.engine.models import StackedModel, load_base
from stackctl.engine.noise import OwnDropout
from stackctl.engine.training import distributed as group
from stackctl.engine.training import preferences
from stackctl.engine.training.adapter import adapter_state
from stackctl.engine.training.attach import Attached, attach_all
from stackctl.engine.training.callbacks import StepCallback
from stackctl.engine.training.dataset import Corpus, read_corpus
from stackctl.engine.training.early_stopping import HeldOut, Measure, held_out_loss
from stackctl.engine.training.fused_modules import keep_casts
from stackctl.engine.training.memory import ProcessGroup, first_that_runs, memory_full, plan_step, runs_out_safely
from stackctl.engine.training.moving import plan_move
from stackctl.engine.training.objectives import OBJECTIVES
from stackctl.engine.training.orthogonal import OrthogonalRows
from stackctl.engine.training.reference import ReferenceModel, fallen
from stackctl.engine.training.register import FinishedRun, describe_run, register_version
from stackctl.engine.training.saves import WRITE_ERRORS, RunSaves
from stackctl.engine.training.state import Counters, RunOutput, RunState
from stackctl.engine.training.targets import Targets, targets_of
from stackctl.engine.training.trainer import StackTrainer, TrainerParts, training_arguments
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob, changed_since, optimizer_steps
from stackctl.jobs.launch_plan import check_whole_parameters
from stackctl.jobs.micro_batches import CUT, StepCut, read_cut
from stackctl.jobs.trackers import log_folder, tracking
from stackctl.machine.resources import map_blocks
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.run_folders import RunFolder, run_folder, step_of
from stackctl.registry.store import Registry
from stackctl.storage import files

_MAPPED, _MAPPED_BF16 = 2**20, 4 * 2**20
"""Bytes of the smallest blocks that are mapped where activations are computed again: what layers hand on cuts the heap
up. SmolLM2 on four records of 1,024 tokens, in float32: 1.95 GB with blocks of 4 MB, and 1.27 with those of 1 MB, at
three quarters of the speed; under autocast 1.73 and 1.56, at the same cost."""


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    version: AdapterVersion
    counters: Counters
    trainable_parameters: int


@dataclass(frozen=True)
class _Run:
    """A run in one process: the job, and the folder of its saves; base and tokenizer, what the adapter stands on in it,
    the data in tokens; then how steps are cut, and the other ways, each needing less."""

    prepared: PreparedJob
    registry: Registry
    output: RunOutput
    resume: bool
    folder: RunFolder
    stacked: StackedModel
    targets: Targets
    corpus: Corpus
    cuts: Sequence[StepCut] = ()


def train_adapter(
    prepared: PreparedJob, registry: Registry, output: RunOutput, *, resume: bool = False
) -> Trained | None:
    """Train, prove and register one adapter version.

    Returns None on every rank but 0, which alone registers.

    Raises:
        VerificationFailed: a proof failed; nothing is registered.
        Failed, Interrupted: the loss is not a number, the disk is full, Ctrl-C; saves are kept.
    """
    if group.keeps_parts():
        check_whole_parameters(prepared)
    check_kernels(prepared.job.optimizer)
    begins = (prepared.beginning.member,) if prepared.beginning else ()
    teachers = prepared.teacher.stack.members if prepared.teacher else ()
    check_digests(registry, (*prepared.stack.members, *begins, *teachers))
    if resume:
        fix_date(run_folder(registry, prepared.name).signature.get("template_date"))
    group.join(choose_device())
    with group.first_rank_first():
        run = _load(prepared, registry, output, resume=resume)
    run = replace(run, cuts=_cuts(run))
    with run.folder.held() if ranks.rank() == 0 else contextlib.nullcontext():
        with group.first_rank_first():
            if ranks.rank() == 0:
                _open_folder(run)
        done = _train(run)
        if ranks.rank() == 0:
            shutil.rmtree(run.folder.path, ignore_errors=True)
        group.wait()
    return done


def _load(prepared: PreparedJob, registry: Registry, output: RunOutput, *, resume: bool) -> _Run:
    """Load the base and read the data, and say what a person should know about both."""
    say = output.say
    stacked = load_base(prepared.base, registry, dtype=prepared.job.dtype, say=say)
    if note := choose_chat_template(stacked.tokenizer, prepared.base.name, prepared.plan):
        say(f"note: {note}")
    told = ranks.is_worker()  # the command that launched this read the data as well, to check it
    quiet = (lambda _: None) if told else say
    targets = targets_of(prepared, stacked.folder, stacked.tokenizer, quiet)
    corpus = read_corpus(prepared, stacked.tokenizer, quiet, output.reading, targets.tokens)
    if not told:
        say(str(targets))
    return _Run(prepared, registry, output, resume, run_folder(registry, prepared.name), stacked, targets, corpus)


def _cuts(run: _Run) -> list[StepCut]:
    """How all processes cut their steps, by the memory that there is."""
    if linked := ranks.link():
        return linked.cuts
    processes = ProcessGroup(ranks.world_size(), group.is_sharded(), group.checkpoints_itself())
    kept = read_cut(run.folder.signature.get(CUT)) if run.resume and run.folder.checkpoints else None
    plan = plan_step(run.prepared, run.corpus, run.targets, processes, kept)
    for text in plan.told():
        run.output.say(text)
    cuts = [plan.cut, *plan.smaller]
    return cuts[-min(group.told_by_each(len(cuts))) :]


def _train(run: _Run) -> Trained | None:
    """Freeze the stack, attach the adapter, train it between two looks at what was frozen, and register it."""
    prepared, stacked, corpus, say = run.prepared, run.stacked, run.corpus, run.output.say
    set_seed(prepared.job.seed)
    saves = run.folder.checkpoints if run.resume else []
    move = None if saves or group.keeps_parts() else plan_move(prepared, corpus, say)
    if move and not move.look_back(stacked, run.registry):
        move = None
    attached = attach_all(stacked, prepared, run.targets, corpus.encoded.examples[0], say)
    model, state = attached.model, RunState(stacked.device)
    if move:
        state.counters.moved = move.begin(model)
    parts, reference = _parts(run, attached, state)
    if ranks.rank() == 0:
        run.folder.begin({**run.folder.signature, CUT: asdict(parts.cut)})
    if parts.cut.checkpointing:
        map_blocks(_MAPPED_BF16 if parts.bfloat16 else _MAPPED)
    arguments = training_arguments(prepared, run.folder.path, len(corpus.rows), stacked.device, parts.cut)
    with tracking(prepared.job, log_folder(run.registry, prepared.name), say):
        trainer = StackTrainer(model, arguments, corpus, parts)
        if prepared.job.orthogonal:
            trainer.add_callback(OrthogonalRows(model, prepared.plan))
        try:
            steps = optimizer_steps(prepared.job, len(corpus.rows), ranks.world_size())
            _run_trainer(trainer, parts, saves, run.output, steps)
        finally:
            if parts.at_once:
                parts.at_once.close()

    if reference and (note := fallen(reference.changes(corpus.encoded.examples), prepared.job.objective)):
        say(f"note: {note}")
    attached.check_unchanged()
    check_digests(run.registry, prepared.stack.members, fresh=True)
    factors = adapter_state(model)
    if ranks.rank() > 0:
        return None
    finished = FinishedRun(
        model, factors, stacked.tokenizer, corpus, describe_run(prepared, stacked, corpus, parts, attached.how),
        state.counters, [token for _, token in sorted(run.targets.tokens.items())],
    )  # fmt: skip
    version = register_version(prepared, run.registry, finished, resume=run.resume)
    return Trained(version, state.counters, attached.trainable)


def _parts(run: _Run, attached: Attached, state: RunState) -> tuple[TrainerParts, ReferenceModel | None]:
    """What Trainer works with, and what answers are compared with."""
    stacked, corpus, job, output = run.stacked, run.corpus, run.prepared.job, run.output
    model, teaching, examples = attached.model, attached.teaching, corpus.encoded.examples
    longest = corpus.max_length if job.objective == "kto" else corpus.longest  # its swapped answers are of any length
    layout = choose_layout(model, examples, longest=longest)
    bfloat16 = computes_in_bfloat16(job.dtype, stacked.device, stacked.model)
    at_once = _at_once(model, run.cuts[0], examples[0], bfloat16=bfloat16)
    reference, answers, measure = _compared(run, attached, at_once, bfloat16=bfloat16)
    held_out = None
    if corpus.evaluation:
        first = 0 if teaching and teaching.name else 1  # what begins as the best pair may stay that
        measure = measure or functools.partial(held_out_loss, examples=corpus.evaluation.examples, at_once=at_once)
        held_out = HeldOut(job, state.counters, output.say, measure, first=first)
    parts = TrainerParts(
        state=state,
        saves=RunSaves(run.folder),
        steps=StepCallback(state, output.progress, output.say, held_out),
        held_out=held_out,
        one_by_one=layout == "one_by_one",
        bfloat16=bfloat16,
        job=job,
        cut=run.cuts[0],
        answers=answers,
        teaching=teaching,
        at_once=at_once,
    )
    if run.prepared.auto_batch and runs_out_safely(stacked.device):
        parts = replace(parts, cut=first_that_runs(model, corpus, parts, run.cuts, output.say))
    return parts, reference


def _at_once(model: PeftModel, cut: StepCut, example: Example, *, bfloat16: bool) -> AtOnce | None:
    """What computes parts of a micro-batch at once, if this model may be called by several threads.

    Noise would be drawn in another order each time, but for that of the new adapter's own dropout.
    """
    own = [module for module in model.modules() if isinstance(module, OwnDropout)]
    if cut.at_once == 1 or draws_noise(model, besides=own):
        return None
    batch = few_tokens(example)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def compute() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = supervised_loss(model, batch)
        torch.autograd.grad(loss, trained, allow_unused=True)

    was_training = model.training
    model.train()
    try:
        if not keeps_nothing(model, compute):
            return None
    finally:
        model.train(was_training)
    if bfloat16:
        keep_casts(model, torch.bfloat16)
    return AtOnce(cut.at_once, noise=bool(own))


def _compared(
    run: _Run, attached: Attached, at_once: AtOnce | None, *, bfloat16: bool
) -> tuple[ReferenceModel | None, preferences.KnownAnswers | None, Measure | None]:
    """What an objective compares with: the frozen stack as the reference and what it makes of the answers, and how
    held-out records are measured."""
    prepared, corpus, teaching = run.prepared, run.corpus, attached.teaching
    job, evaluation = prepared.job, corpus.evaluation
    if teaching:
        measure = functools.partial(teaching.measure, examples=evaluation.examples) if evaluation else None
        return None, None, measure
    if job.objective not in OBJECTIVES:
        return None, None, None
    reference = ReferenceModel(
        attached.model, attached.live, not prepared.beginning, bfloat16, prepared.stands_on(), run.output.comparing,
        at_once,
    )  # fmt: skip
    answers = reference.know(corpus.encoded, job, corpus.max_length)
    if not evaluation:
        return reference, answers, None
    known = reference.know(evaluation, job, corpus.max_length, held_out=True)
    return reference, answers, functools.partial(preferences.measure, known=known, job=job, at_once=at_once)


def _run_trainer(trainer: StackTrainer, parts: TrainerParts, saves: list[Path], output: RunOutput, steps: int) -> None:
    """Let Trainer run from the last save, or from the beginning, to the weights that are to be registered.

    What was saved after the last of the ``steps`` is only restored: in mid-epoch Trainer would take one more.

    Raises:
        Failed: the loss is not a number, a save could not be written, the device's memory is full.
        Interrupted, Terminated: a signal ended it; it was saved.
    """
    held_out, state = parts.held_out, parts.state
    if saves:
        step = step_of(saves[-1])
        output.say(f"going on after step {step}")
        trainer.restore(saves[-1])
        if step >= steps or (held_out and held_out.is_over):  # it ended between the last step and the registering
            if held_out:
                held_out.use_kept(trainer.peft_model)
            return
    trainer.args.eval_on_start = held_out is not None and not saves
    try:
        trainer.train(resume_from_checkpoint=str(saves[-1]) if saves else None)
    except torch.OutOfMemoryError as error:
        raise memory_full() from error
    except WRITE_ERRORS as error:
        parts.saves.fail(error)
        raise
    finally:
        parts.steps.release_signals()
    if state.stop_signal:
        kind = Terminated if state.stop_signal == signal.SIGTERM else Interrupted
        raise kind(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; it was saved",
            hint=f"go on with: {output.again}",
        )
    if held_out:
        held_out.use_kept(trainer.peft_model)


def _open_folder(run: _Run) -> None:
    """Make the folder ready for this run's saves; without ``--resume`` an older run of that name is dropped.

    Raises:
        Usage: what was saved belongs to a run with other settings.
    """
    folder, prepared, held_out = run.folder, run.prepared, run.corpus.held_out
    signature = prepared.signature(run.corpus.records.sha256, held_out.sha256 if held_out else None)
    if run.resume and folder.checkpoints:
        changed = changed_since(folder.signature, signature)
        if changed:
            raise Usage(
                f"the unfinished run of '{prepared.name}' had other {', '.join(changed)}",
                hint="give the same name, data and flags, or leave out --resume to start again",
            )
        folder.sweep()
    elif folder.path.exists():
        files.remove_tree(folder.path)
    folder.begin({**signature, "template_date": shown_date(run.stacked.tokenizer)})
