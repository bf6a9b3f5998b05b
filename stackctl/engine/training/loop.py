"""One run of the Trainer: its arguments, its saves, how it ends."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainingArguments

from stackctl.core.errors import Failed, Interrupted, Terminated
from stackctl.core.schema import TrainJob
from stackctl.engine import data as data_module
from stackctl.engine.data import Example
from stackctl.engine.training.callbacks import Counters, Progress
from stackctl.engine.training.dataset import Corpus
from stackctl.engine.training.early_stopping import HeldOut, evaluation_steps
from stackctl.engine.training.orthogonal import OrthogonalRows
from stackctl.engine.training.trainer import StackTrainer
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.trackers import parse_trackers
from stackctl.registry.run_folders import RunFolder


def _all_steps(job: TrainJob, rows: int) -> int:
    """Optimizer steps of a whole run."""
    batches = -(-rows // (job.batch_size * ranks.world_size()))
    return job.max_steps or math.ceil(-(-batches // job.gradient_accumulation) * job.epochs)


def _warmup_steps(job: TrainJob, steps: int) -> int:
    """Steps of rising rate, always fewer than there are: a run of one step that only warmed up would learn nothing."""
    wanted = int(job.warmup) if job.warmup >= 1 else int(job.warmup * steps)
    return min(wanted, steps - 1)


def run_trainer(
    prepared: PreparedJob,
    model: PeftModel,
    corpus: Corpus,
    run: RunFolder,
    counters: Counters,
    as_rows: bool,
    bfloat16: bool,
    resume: bool,
    again: str,
    progress: Progress,
    say: Callable[[str], None],
    held_out: HeldOut | None,
) -> None:
    job = prepared.job
    steps = _all_steps(job, len(corpus.rows))
    arguments = TrainingArguments(
        output_dir=str(run.path),
        per_device_train_batch_size=job.batch_size,
        gradient_accumulation_steps=job.gradient_accumulation,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.scheduler,
        warmup_steps=_warmup_steps(job, steps),
        weight_decay=job.weight_decay,
        seed=job.seed,
        data_seed=job.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps" if job.save_steps else "no",
        save_steps=job.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if held_out else "no",
        eval_steps=evaluation_steps(job, steps),
        report_to=parse_trackers(job.report_to) or "none",
        run_name=prepared.name,
        project="stackctl",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=job.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},  # the other kind wants inputs that have a gradient
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=next(model.parameters()).device.type == "cpu",
        average_tokens_across_devices=False,  # the loss is normalised over all ranks by StackTrainer itself
        label_names=["labels"],
    )
    trainer = StackTrainer(
        model=model,
        args=arguments,
        train_dataset=[*corpus.rows, []] if ranks.world_size() > 1 else corpus.rows,
        eval_dataset=corpus.evaluation.examples if corpus.evaluation else None,
        data_collator=_collate,
        run=run,
        counters=counters,
        as_rows=as_rows,
        bfloat16=bfloat16,
        progress=progress,
        say=say,
        held_out=held_out,
    )
    if job.orthogonal:
        trainer.add_callback(OrthogonalRows(model, prepared.plan))
    saves = run.checkpoints if resume else []
    if saves:
        say(f"going on after step {saves[-1].name.rpartition('-')[2]}")
    if saves and held_out:
        trainer.restore(saves[-1])
        if held_out.is_over:  # killed between the last step and the registering
            held_out.use_kept(trainer.model)
            return
    try:
        trainer.train(resume_from_checkpoint=str(saves[-1]) if saves else None)
    except torch.OutOfMemoryError as error:
        raise Failed("the device's memory is full", hint="use a smaller --batch-size or --max-length") from error
    finally:
        trainer.guard.release()
    if trainer.guard.stopped:
        kind = Terminated if trainer.guard.stopped == signal.SIGTERM else Interrupted
        raise kind(
            f"interrupted after step {trainer.state.global_step} of {trainer.state.max_steps}; it was saved",
            hint=f"go on with: {again}",
        )
    if held_out:
        held_out.use_kept(trainer.model)


def _collate(rows: list[list[Example]]) -> dict[str, Tensor]:
    """One micro-batch; of a place that stands empty, two tokens of which nothing is learned."""
    examples = [example for row in rows for example in row]
    return data_module.collate(examples or [Example([0, 0], [data_module.IGNORED] * 2)])
