"""Train one adapter on a frozen, active stack, prove it, and register it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from transformers import set_seed

from stackctl.core.errors import Usage
from stackctl.core.schema import AdapterVersion, Run
from stackctl.engine import data as data_module
from stackctl.engine.data import Reading
from stackctl.engine.live_adapter import LIVE
from stackctl.engine.models import StackedModel, choose_device, computes_in_bfloat16, load_base
from stackctl.engine.row_layout import choose_layout
from stackctl.engine.training import distributed as group
from stackctl.engine.training import proofs
from stackctl.engine.training.adapter import adapter_state
from stackctl.engine.training.attach import attach_new, freeze_stack
from stackctl.engine.training.callbacks import Counters, Progress
from stackctl.engine.training.dataset import Corpus, read_corpus
from stackctl.engine.training.early_stopping import HeldOut
from stackctl.engine.training.loop import run_trainer
from stackctl.engine.training.memory import estimate_job
from stackctl.engine.training.register import register_version
from stackctl.engine.training.targets import Targets, targets_of
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob, changed_since
from stackctl.jobs.launch import NOT_WHOLE
from stackctl.jobs.trackers import log_folder, tracking
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.run_folders import RunFolder, run_folder
from stackctl.registry.store import Registry
from stackctl.storage import files

Say = Callable[[str], None]


@dataclass(frozen=True)
class Trained:
    """A finished run."""

    version: AdapterVersion
    counters: Counters
    trainable_parameters: int


def train_adapter(
    prepared: PreparedJob,
    registry: Registry,
    *,
    resume: bool,
    again: str,
    say: Say,
    progress: Progress,
    reading: Reading = lambda _: None,
) -> Trained | None:
    """Train, prove and register one adapter version; ``again`` is the command that goes on after an interruption.

    Returns None on every rank but 0, which alone registers.

    Raises:
        VerificationFailed: a proof failed; nothing is registered.
        Failed, Interrupted: the loss is no number, the disk is full, Ctrl-C; saves are kept.
    """
    if prepared.job.orthogonal and group.keeps_parts():
        raise NOT_WHOLE
    check_digests(registry, prepared.stack.members)
    if resume:
        data_module.fix_date(run_folder(registry, prepared.name).signature.get("template_date"))
    group.join(choose_device())
    with group.first_rank_first():
        stacked = load_base(prepared.base, registry, dtype=prepared.job.dtype, say=say)
        if note := data_module.adopt_chat_template(stacked.tokenizer, prepared.base.name, [prepared.plan]):
            say(f"note: {note}")
        if data_module.ensure_chat_template(stacked.tokenizer):
            say(f"note: the base '{prepared.base.name}' has no chat template: ChatML is used")
        targets = targets_of(prepared, stacked.folder)
        told = ranks.is_worker()  # the command that launched this read the data as well, to check it
        corpus = read_corpus(prepared, stacked.tokenizer, (lambda _: None) if told else say, reading)
        if not told:
            say(str(targets))
            say(str(estimate_job(prepared, corpus, processes=ranks.world_size(), sharded=group.is_sharded())))
    run = run_folder(registry, prepared.name)
    with run.held() if ranks.rank() == 0 else contextlib.nullcontext():
        with group.first_rank_first():
            if ranks.rank() == 0:
                _open_run(run, prepared, corpus, resume, data_module.shown_date(stacked.tokenizer))
        done = _train(
            prepared, registry, stacked, targets, corpus, run, resume=resume, again=again, say=say, progress=progress
        )
        if ranks.rank() == 0:
            shutil.rmtree(run.path, ignore_errors=True)
        group.wait()
    return done


def _train(
    prepared: PreparedJob,
    registry: Registry,
    stacked: StackedModel,
    targets: Targets,
    corpus: Corpus,
    run: RunFolder,
    *,
    resume: bool,
    again: str,
    say: Say,
    progress: Progress,
) -> Trained | None:
    set_seed(prepared.job.seed)
    probe_tokens = proofs.probe_tokens(corpus.encoded.examples[0].input_ids)
    bare = proofs.probe(stacked.model, probe_tokens)
    how = freeze_stack(stacked, prepared, say)
    model = attach_new(stacked, prepared, targets, live=how == "live")
    live = LIVE if how == "live" else None
    trainable = proofs.check_trainable(model)
    with proofs.new_adapter_off(model, live):
        frozen = proofs.probe(model, probe_tokens)
    if prepared.plan.members:
        effect = proofs.check_active(bare, frozen, prepared.plan.expression)
        say(f"{prepared.plan.expression} is frozen ({how}) and active: it moves the logits by {effect:.1%}")
    counters = Counters()
    bfloat16 = computes_in_bfloat16(prepared.job.dtype, stacked.device, stacked.model)
    examples = corpus.encoded.examples
    longest = int(data_module.lengths_of(examples).max())
    as_rows = choose_layout(model, examples, longest=longest) == "apart"
    held_out = HeldOut(corpus.evaluation.examples, prepared.job, counters, say) if corpus.evaluation else None
    with tracking(prepared.job, log_folder(registry, prepared.name), say):
        run_trainer(prepared, model, corpus, run, counters, as_rows, bfloat16, resume, again, progress, say, held_out)
    with proofs.new_adapter_off(model, live):
        proofs.check_unchanged(frozen, proofs.probe(model, probe_tokens))
    proofs.check_trainable(model)
    check_digests(registry, prepared.stack.members, fresh=True)
    state = adapter_state(model)
    if ranks.rank() > 0:
        return None
    outcome = Run(
        steps=len(counters.curve),
        epochs=round(counters.tokens / max(corpus.encoded.tokens, 1), 4),
        loss=counters.loss,
        tokens=counters.tokens,
        supervised_tokens=counters.supervised_tokens,
        seconds=round(counters.seconds, 3),
        frozen=how,  # type: ignore[arg-type]
        frozen_error=stacked.rounding_error if how == "fold" else None,
        initial_seed=prepared.initial_seed,
        dtype=("nf4, " if prepared.job.dtype == "nf4" else "")
        + str(stacked.model.dtype).removeprefix("torch.")
        + (", bfloat16 autocast" if bfloat16 else ""),
        device=stacked.device.type,
        processes=ranks.world_size(),
        eval_loss_before=held_out.looks[0]["eval_loss"] if held_out else None,
        eval_loss=held_out.kept["eval_loss"] if held_out else None,
        kept_step=int(held_out.kept["step"]) if held_out else None,
        stopped_early=held_out is not None and held_out.is_over,
        template_date=data_module.shown_date(stacked.tokenizer),
    )
    version = register_version(
        prepared, registry, model, state, stacked.tokenizer, corpus, outcome, counters, resume=resume
    )
    return Trained(version, counters, trainable)


def _open_run(run: RunFolder, prepared: PreparedJob, corpus: Corpus, resume: bool, date: str | None) -> None:
    """Make the folder ready for this run's saves; without ``--resume`` an older run of that name is dropped.

    Raises:
        Usage: what was saved belongs to a run with other settings.
    """
    signature = prepared.signature(corpus.records.sha256, corpus.held_out.sha256 if corpus.held_out else None)
    if resume and run.checkpoints:
        changed = changed_since(run.signature, signature)
        if changed:
            raise Usage(
                f"the unfinished run of '{prepared.name}' had other {', '.join(changed)}",
                hint="give the same name, data and flags, or leave out --resume to start again",
            )
        run.sweep()
    elif run.path.exists():
        files.remove_tree(run.path)
    run.begin({**signature, "template_date": date})
