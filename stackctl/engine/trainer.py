"""transformers' Trainer, told what a stack needs: exact loss, the right adapter saved, numbers of the whole run.

Trainer keeps what it is good at: the loop, accumulation, optimizer, schedule, distribution, resuming. Overridden is
only what would otherwise be silently wrong here (DESIGN: the traps).
"""

from __future__ import annotations

import inspect
import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from stackctl import files
from stackctl.checkpoint import CONFIG, WEIGHTS
from stackctl.errors import Failed

if TYPE_CHECKING:
    from stackctl.engine.training.watching import HeldOut

ADAPTER = "default"
"""The name inside PEFT of the adapter in training; PEFT saves that one at a folder's root."""
_COUNTERS = "stackctl_counters.json"


@dataclass
class Counters:
    """What a run has seen so far. ``loss_sum`` is over supervised tokens; ``curve`` has an entry per optimizer step.

    ``looks`` are the losses on held-out records, see :class:`stackctl.engine.training.watching.HeldOut`.
    """

    tokens: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    looks: list[dict[str, float]] = field(default_factory=list)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.supervised_tokens if self.supervised_tokens else math.nan

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


Progress = Callable[[int, int, Counters], None]


def supervised_loss(model: nn.Module, inputs: dict[str, Tensor], *, as_rows: bool = False) -> Tensor:
    """Summed cross-entropy of a collated micro-batch; logits are computed only where a label is.

    ``inputs``: input_ids and position_ids (1, T), keep (K,), labels (K,), as :func:`stackctl.engine.data.collate`
    makes them. ``as_rows`` runs the examples one by one, for models that cannot keep documents in one row apart.
    """
    if as_rows:
        return torch.stack([supervised_loss(model, part) for part in _split(inputs)]).sum()
    logits = supervised_logits(model, inputs)
    return functional.cross_entropy(logits.float(), inputs["labels"], reduction="sum")


def supervised_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits (K, vocabulary) at the positions that predict a supervised token."""
    keep = inputs["keep"]
    arguments: dict[str, Any] = {
        "input_ids": inputs["input_ids"],
        "position_ids": inputs["position_ids"],
        "use_cache": False,
        "return_dict": True,
    }
    accepted = inspect.signature(_causal_lm(model).forward).parameters
    if "position_ids" not in accepted:
        del arguments["position_ids"]
    if "logits_to_keep" in accepted:
        logits: Tensor = model(**arguments, logits_to_keep=keep).logits[0]
        return logits
    return model(**arguments).logits[0, keep]


def _causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model under whatever wraps it (DDP, PEFT)."""
    model = getattr(model, "module", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _split(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a collated row, each as a row of its own."""
    positions = inputs["position_ids"][0]
    starts = torch.nonzero(positions == 0).flatten().tolist()
    parts = []
    for start, end in zip(starts, [*starts[1:], positions.numel()], strict=True):
        inside = (inputs["keep"] >= start) & (inputs["keep"] < end)
        if bool(inside.any()):
            parts.append(
                {
                    "input_ids": inputs["input_ids"][:, start:end],
                    "position_ids": inputs["position_ids"][:, start:end],
                    "keep": inputs["keep"][inside] - start,
                    "labels": inputs["labels"][inside],
                }
            )
    return parts


class StackTrainer(Trainer):
    """Trainer for one adapter on a frozen stack; see the module's docstring."""

    def __init__(
        self,
        *args: Any,
        counters: Counters,
        as_rows: bool,
        bfloat16: bool,
        progress: Progress,
        held_out: HeldOut | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.held_out = held_out
        self._bfloat16 = bfloat16
        self.counters = counters
        self._as_rows = as_rows
        self._step_loss = torch.zeros((), dtype=torch.float64, device=self._sum_device())
        self._step_tokens = self._step_supervised = 0
        self.model_accepts_loss_kwargs = True  # the loss below is normalised over the whole step already
        for printer in (PrinterCallback, ProgressCallback):  # they print on stdout, which belongs to the result
            self.remove_callback(printer)
        self.guard = StepGuard(self, progress)
        self.add_callback(self.guard)
        if held_out:
            self.add_callback(held_out)

    def _sum_device(self) -> torch.device:
        device = self.args.device
        return torch.device("cpu") if device.type == "mps" else device  # MPS has no float64

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Supervised tokens of the whole optimizer step, over all micro-batches and ranks."""
        count = torch.tensor(sum(batch["labels"].numel() for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Cross-entropy summed over this micro-batch, divided by the supervised tokens of the whole step."""
        # Not Trainer's own bf16 flag: that leaves the model's forward wrapped, and the proofs look at it afterwards.
        with torch.autocast(self.args.device.type, torch.bfloat16, enabled=self._bfloat16):
            total = supervised_loss(model, inputs, as_rows=self._as_rows)
        self._step_loss += total.detach().to(self._step_loss)
        self._step_tokens += inputs["input_ids"].numel()
        self._step_supervised += inputs["labels"].numel()
        # DDP averages gradients over ranks, and this is each rank's share of one mean: undo the average.
        return total / num_items_in_batch * self.args.world_size

    def take_step_totals(self) -> tuple[float, int, int]:
        """Loss sum, tokens and supervised tokens since the last call, over all ranks."""
        own = [float(self._step_loss), float(self._step_tokens), float(self._step_supervised)]
        self._step_loss.zero_()
        self._step_tokens = self._step_supervised = 0
        loss, tokens, supervised = self.sum_over_processes(own)
        return loss, int(tokens), int(supervised)

    def sum_over_processes(self, numbers: list[float]) -> list[float]:
        """Numbers of each process, added up; every process gets the sums."""
        if self.args.world_size == 1:
            return numbers
        own = torch.tensor([numbers], dtype=torch.float64, device=self._sum_device())
        sums: list[float] = self.accelerator.gather(own).sum(0).tolist()
        return sums

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Look at the held-out records. Trainer's own loop would pad them and average over batches."""
        assert self.held_out is not None, "nothing asks for this without held-out records"
        started = time.perf_counter()
        metrics = {"eval_loss": self.held_out.look(self)}
        self.log(metrics)
        # Callbacks change the one control that Trainer holds.
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.guard.away += time.perf_counter() - started
        return metrics

    # -- saves of an unfinished run -------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save the adapter in training and nothing else, at the folder's root."""
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            save_adapter(self.accelerator.unwrap_model(self.model), folder, state_dict)
            files.write_atomic(folder / _COUNTERS, json.dumps(asdict(self.counters)))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """What every process has a part of: here also the best weights so far."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.held_out:
            self.held_out.save(Path(output_dir), self.args.process_index)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the adapter in training by its name. Trainer's own way takes the first adapter, and unfreezes it."""
        self.restore(Path(resume_from_checkpoint), model)

    def restore(self, folder: Path, model: nn.Module | None = None) -> None:
        """The adapter in training, the numbers of the run and the best weights so far, out of a save."""
        target = self.accelerator.unwrap_model(model or self.model)
        result = set_peft_model_state_dict(target, load_file(folder / WEIGHTS), adapter_name=ADAPTER)
        if result.unexpected_keys:
            raise Failed(f"{folder} is not a save of this run", hint="start it again without --resume")
        saved = json.loads((folder / _COUNTERS).read_text())
        for name, value in saved.items():
            setattr(self.counters, name, value)
        if self.held_out:
            self.held_out.load(folder, self.args.process_index)


def save_adapter(model: PeftModel, folder: Path, state_dict: dict | None = None) -> None:
    """Write the adapter in training as a PEFT checkpoint at ``folder``'s root, in float32."""
    model.save_pretrained(
        folder, selected_adapters=[ADAPTER], save_embedding_layers=False, safe_serialization=True, state_dict=state_dict
    )
    config = folder / CONFIG
    settings = json.loads(config.read_text())
    if isinstance(settings.get("target_modules"), list):  # a set inside PEFT, and so in another order in each process
        settings["target_modules"].sort()
        config.write_text(json.dumps(settings, indent=2, sort_keys=True))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; our card is written when something is pushed


class StepGuard(TrainerCallback):
    """Counts steps, keeps the loss curve, stops at a loss that is no number, and lets Ctrl-C end a step in peace."""

    def __init__(self, trainer: StackTrainer, progress: Progress) -> None:
        self._trainer = trainer
        self._progress = progress
        self._started = 0.0
        self._before = 0.0
        self._rate = 0.0
        self.away = 0.0  # seconds since the start that were not training
        self._previous_handler: Any = None
        self.interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        try:
            self._previous_handler = signal.signal(signal.SIGINT, self._on_interrupt)
        except ValueError:  # not in the main thread
            self._previous_handler = None
        if self._trainer.held_out and not self._trainer.counters.looks:
            self._trainer.evaluate()
        self.away = 0.0
        self._before = self._trainer.counters.seconds
        self._started = time.perf_counter()

    def _on_interrupt(self, *_: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The rate that this step is taken with; afterwards the schedule shows the next one's."""
        optimizer = self._trainer.optimizer
        self._rate = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        counters = self._trainer.counters
        loss_sum, tokens, supervised = self._trainer.take_step_totals()
        counters.loss_sum += loss_sum
        counters.tokens += tokens
        counters.supervised_tokens += supervised
        counters.seconds = self._before + time.perf_counter() - self._started - self.away
        loss = loss_sum / supervised if supervised else math.nan
        if not math.isfinite(loss):
            raise Failed(
                f"the loss of step {state.global_step} is not a finite number",
                hint="try a lower --learning-rate, or --dtype float32; nothing was registered",
            )
        rate = self._rate
        counters.curve.append(
            {"step": state.global_step, "loss": loss, "learning_rate": rate, "tokens": counters.tokens}
        )
        self._progress(state.global_step, state.max_steps, counters)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Give Ctrl-C back, however the training ended."""
        if self._previous_handler is not None:
            signal.signal(signal.SIGINT, self._previous_handler)
            self._previous_handler = None
