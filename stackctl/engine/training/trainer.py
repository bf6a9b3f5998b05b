"""transformers' Trainer, told what a stack needs: exact loss, the right adapter saved, numbers of the whole run.

Trainer keeps what it is good at: the loop, accumulation, optimizer, schedule, distribution, resuming. Overridden is
only what would otherwise be silently wrong here: six public methods, and ``_load_from_checkpoint`` as it is in
transformers 5.24, which has no public way to say how an adapter is loaded.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stackctl.core.errors import Failed
from stackctl.core.train_job import TrainJob
from stackctl.engine.at_once import AtOnce
from stackctl.engine.data.rows import deal_row, split_row
from stackctl.engine.loss.logits import supervised_loss
from stackctl.engine.training.adapter import adapter_state, named_parameters, save_adapter
from stackctl.engine.training.callbacks import StepCallback
from stackctl.engine.training.dataset import Corpus
from stackctl.engine.training.distributed import WholeSteps, like, numbers_of_each
from stackctl.engine.training.early_stopping import HeldOut, evaluation_steps
from stackctl.engine.training.objectives import OBJECTIVES
from stackctl.engine.training.preferences import KnownAnswers, Scores, answer_scores, collate_answers, drift_of
from stackctl.engine.training.saves import RunSaves
from stackctl.engine.training.state import RunState
from stackctl.engine.training.teaching import Teaching
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob, optimizer_steps
from stackctl.jobs.micro_batches import StepCut
from stackctl.jobs.trackers import parse_trackers
from stackctl.lora.checkpoint import WEIGHTS
from stackctl.storage import atomic

CHECKPOINTING = {"use_reentrant": False}
"""How activations are computed again; the other kind wants inputs that have a gradient."""
_OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw-8bit": "adamw_bnb_8bit", "paged-adamw-8bit": "paged_adamw_8bit"}
"""What Trainer calls each."""
_COUNTERS = "stackctl_counters.json"


@dataclass(frozen=True)
class TrainerParts:
    """What a Trainer works with besides its arguments; ``one_by_one``: records cannot share a row on this model."""

    state: RunState
    saves: RunSaves
    steps: StepCallback
    held_out: HeldOut | None
    one_by_one: bool
    bfloat16: bool
    job: TrainJob
    cut: StepCut
    answers: KnownAnswers | None = None
    """What is known of the answers, where it learns from those."""
    teaching: Teaching | None = None
    """By whom it is taught, where it distils."""
    at_once: AtOnce | None = None
    """What computes parts of a micro-batch at once, where that is done."""

    @property
    def drifts(self) -> bool:
        """Whether there are swapped answers, by which KTO tells how far the model is from the reference."""
        return self.answers is not None and self.answers.swapped is not None


class StackTrainer(Trainer):
    """Trainer for one adapter on a frozen stack; see the module's docstring."""

    def __init__(self, model: PeftModel, arguments: TrainingArguments, corpus: Corpus, parts: TrainerParts) -> None:
        several = ranks.world_size() > 1
        rows = corpus.rows.of(parts.answers) if parts.answers else corpus.rows
        train = [*rows, []] if several else rows  # the last one fills up a step
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=train,
            eval_dataset=corpus.evaluation.examples if corpus.evaluation else None,
            data_collator=functools.partial(collate_answers, drifts=parts.drifts),
        )
        self.peft_model, self._rows = model, train
        self._parts, self._run = parts, parts.state
        self._drift: Tensor | None = None
        self.model_accepts_loss_kwargs = True  # the loss below is normalised over the whole step already
        for printer in (PrinterCallback, ProgressCallback):  # they print on stdout, which belongs to the result
            self.remove_callback(printer)
        for callback in (parts.steps, parts.held_out, parts.saves):
            if callback is not None:
                self.add_callback(callback)

    def _autocast(self) -> torch.autocast:
        """Not Trainer's own bf16 flag: that leaves the model's forward wrapped, which the proofs look at afterwards."""
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._parts.bfloat16)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and what its loss is the mean of: tokens, pairs or answers of all ranks.

        Where an objective looks at the drift, that is measured here, before the step.
        """
        parts, batches = self._parts, list(itertools.islice(epoch_iterator, num_batches))
        key, each = ("references", OBJECTIVES[parts.job.objective].answers) if parts.answers else ("labels", 1)
        own = sum(batch[key].numel() // each for batch in batches)
        if parts.drifts:
            with self._autocast():
                self._drift = drift_of(self.peft_model, batches, one_by_one=parts.one_by_one)
        return batches, numbers_of_each([float(own)], device).sum().long().to(device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """A micro-batch forward and back, in parts where it has many tokens: the gradients add up to that of all."""
        self._run.add_micro_batch(inputs)
        if self._parts.at_once:
            return self._parts_at_once(model, inputs, num_items_in_batch, self._parts.at_once)
        *before, last = self._split(inputs)
        losses = []
        for part in before:
            with self.accelerator.no_sync(model):
                losses.append(super().training_step(model, part, num_items_in_batch))
        losses.append(super().training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _parts_at_once(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, at_once: AtOnce
    ) -> Tensor:
        """The same in parts of which some are computed at once; one that has too many tokens, by all threads before."""
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def compute(part: dict[str, Any]) -> tuple[tuple[Tensor, Tensor, Scores | None], tuple[Tensor | None, ...]]:
            share, total, scores = self._loss(model, part, num_items_in_batch)
            gradients = torch.autograd.grad(share, trained, allow_unused=True)
            return (share.detach(), total.detach(), scores), gradients

        most = self._parts.cut.beside
        parts = deal_row(inputs, at_once.count, most, together=self._together)
        shares = []
        for (share, total, scores), gradients in at_once.map(
            compute, parts, lambda part: part["input_ids"].numel() > most
        ):
            self._count(total, scores)
            shares.append(share)
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return torch.stack(shares).sum()

    @property
    def _together(self) -> int:
        return OBJECTIVES[self._parts.job.objective].answers if self._parts.answers else 1

    def _split(self, inputs: dict[str, Any]) -> list[dict[str, Any]]:
        most = self._parts.cut.tokens
        if most is None or self.is_deepspeed_enabled:  # its engine counts backward passes
            return [inputs]
        return split_row(inputs, most, together=self._together)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """The loss summed over this micro-batch, divided by the supervised tokens, or pairs or answers, of the step."""
        share, total, scores = self._loss(model, inputs, num_items_in_batch)
        self._count(total, scores)
        return share

    def _loss(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Scores | None]:
        """The same, the sum alone, and of answers their scores."""
        with self._autocast():
            total, scores = micro_batch_loss(model, inputs, self._parts, self._drift)
        # DDP averages gradients over ranks, and this is each rank's share of one mean: undo the average.
        return total / num_items_in_batch * self.args.world_size, total, scores

    def _count(self, total: Tensor, scores: Scores | None) -> None:
        if scores:
            self._run.add_answers(scores)
        self._run.add_loss(total)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What the held-out records say. Trainer's own loop would pad them and average over batches."""
        held_out = self._parts.held_out
        assert held_out is not None, "nothing asks for this without held-out records"
        started = time.perf_counter()
        metrics = held_out.evaluate(self.model_wrapped, self.peft_model, self.state.global_step)
        self.log(metrics)
        # Callbacks change the one control that Trainer holds.
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._run.evaluating_seconds += time.perf_counter() - started
        return metrics

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The rows in the order of one process, dealt out to several so that no record is seen twice."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        batch = self.args.per_device_train_batch_size
        self._run.order = WholeSteps(len(self._rows) - 1, batch * self.args.world_size, self.args.data_seed or 0)
        loader: DataLoader[Any] = DataLoader(
            self._rows,  # type: ignore[arg-type]  # any sequence will do
            batch_size=batch,
            sampler=self._run.order,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter in training and nothing else, at the folder's root, whatever wraps the model."""
        folder = Path(output_dir or str(self.args.output_dir))
        self._parts.saves.begin(folder)
        model = self.accelerator.unwrap_model(self.peft_model)
        state = adapter_state(model)
        if self.args.should_save:
            save_adapter(model, folder, state)
            atomic.write_atomic(folder / _COUNTERS, json.dumps(asdict(self._run.counters)))
        if self._parts.held_out:  # every process has a part of the best weights
            self._parts.held_out.save(folder, self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapter in training by its name. Trainer's own way takes the first adapter, and unfreezes it."""
        self.restore(Path(resume_from_checkpoint), model)

    def restore(self, folder: Path, model: nn.Module | None = None) -> None:
        """The adapter in training, the numbers of the run and the best weights so far, out of a save."""
        parameters = named_parameters(self.accelerator.unwrap_model(model or self.model))
        saved = load_file(folder / WEIGHTS)
        numbers = json.loads((folder / _COUNTERS).read_text())
        if saved.keys() != parameters.keys() or numbers.keys() != asdict(self._run.counters).keys():
            raise Failed(f"{folder} is not a save of this run", hint="start it again without --resume")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(like(parameter, saved[name]))
        self._run.counters.restore(numbers)
        if self._parts.held_out:
            self._parts.held_out.load(folder, self.args.process_index)


def micro_batch_loss(
    model: nn.Module, inputs: dict[str, Any], parts: TrainerParts, drift: Tensor | None
) -> tuple[Tensor, Scores | None]:
    """The summed loss (scalar, nats) of a micro-batch, and of answers their scores."""
    if parts.answers:
        scores = answer_scores(model, inputs, parts.job, drift=drift, one_by_one=parts.one_by_one)
        return scores.losses.sum().float(), scores
    if parts.teaching:
        return parts.teaching.divergences(model, inputs, one_by_one=parts.one_by_one).sum(), None
    return supervised_loss(model, inputs, one_by_one=parts.one_by_one), None


def training_arguments(
    prepared: PreparedJob, output: Path, rows: int, device: torch.device, cut: StepCut
) -> TrainingArguments:
    """A job in Trainer's own settings.

    Args:
        output: where saves lie.
        rows: what an epoch consists of.
    """
    job = prepared.job
    steps = optimizer_steps(job, rows, ranks.world_size())
    evaluates = job.eval_data is not None
    made = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=cut.rows,
        gradient_accumulation_steps=cut.accumulated,
        num_train_epochs=job.epochs,
        max_steps=job.max_steps or -1,
        learning_rate=job.learning_rate,
        lr_scheduler_type=job.scheduler,
        warmup_steps=_warmup_steps(job, steps),
        weight_decay=job.weight_decay,
        optim=_OPTIMIZERS[job.optimizer],
        seed=job.seed,
        data_seed=job.seed,
        logging_strategy="steps",
        logging_steps=1,
        save_strategy="steps" if job.save_steps else "no",
        save_steps=job.save_steps or 500,
        save_total_limit=2,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=evaluation_steps(job, steps),
        report_to=parse_trackers(job.report_to) or "none",
        run_name=prepared.name,
        project="stackctl",
        disable_tqdm=True,
        remove_unused_columns=False,
        gradient_checkpointing=cut.checkpointing,
        gradient_checkpointing_kwargs=CHECKPOINTING,
        dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=device.type == "cpu",
        average_tokens_across_devices=False,  # the loss is normalised over all ranks by StackTrainer itself
        label_names=["labels"],
    )
    made._n_gpu = min(made.n_gpu, 1)  # else a process that sees several GPUs would deal a micro-batch's one row to all
    return made


def _warmup_steps(job: TrainJob, steps: int) -> int:
    """Steps of rising rate, always fewer than there are: a run of one step that only warmed up would learn nothing."""
    wanted = int(job.warmup) if job.warmup >= 1 else math.floor(job.warmup * steps + 1e-9)  # 0.29 of 100 is 29
    return min(wanted, steps - 1)
