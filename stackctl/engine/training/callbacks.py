"""What happens after every optimizer step: counting, the loss curve, and the ways a training may end early."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackctl.core.errors import Failed
from stackctl.jobs import ranks

if TYPE_CHECKING:
    from stackctl.engine.training.trainer import StackTrainer


@dataclass
class Counters:
    """What a run has seen so far. ``loss_sum`` is over supervised tokens; ``curve`` has an entry per optimizer step.

    ``looks`` are the losses on held-out records, see :class:`stackctl.engine.training.early_stopping.HeldOut`.
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


class StepGuard(TrainerCallback):
    """Counts steps, keeps the loss curve, stops at a loss that is no number, and lets Ctrl-C end a step in peace.

    ``stopped`` is the signal that ended the training, on any of the ranks, else 0.
    """

    def __init__(self, trainer: StackTrainer, progress: Progress, say: Callable[[str], None]) -> None:
        self._trainer = trainer
        self._progress = progress
        self._say = say
        self._started = 0.0
        self._before = 0.0
        self._rate = 0.0
        self.away = 0.0  # seconds since the start that were not training
        self._previous: dict[signal.Signals, Any] = {}
        self._asked = 0
        self.stopped = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        if self._trainer.held_out and not self._trainer.counters.looks:
            self._trainer.evaluate()
        self.away = 0.0
        self._before = self._trainer.counters.seconds
        self._started = time.perf_counter()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say whose order is wanted: where several ranks resume in mid-epoch, accelerate's skipping does not."""
        if self._trainer.order:
            self._trainer.order.set_epoch(int(state.epoch or 0))

    def _on_signal(self, number: int, _: object) -> None:
        if self._asked and not ranks.is_launched():  # a launcher passes on what the terminal has sent already
            raise KeyboardInterrupt
        self._asked = number
        with contextlib.suppress(RuntimeError):  # it came while something was written, which cannot be entered twice
            self._say(f"note: {ranks.ENDING}")

    def _wish(self) -> int:
        """The signal by which this rank was asked to stop; 0 when it was not."""
        linked = ranks.link()
        word = linked.stop if linked else None
        return self._asked or {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(word or "", 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """The rate that this step is taken with; afterwards the schedule shows the next one's."""
        optimizer = self._trainer.optimizer
        self._rate = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        counters = self._trainer.counters
        loss_sum, tokens, supervised, self.stopped = self._trainer.take_step_totals(self._wish())
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
        if args.world_size == 1:  # what came meanwhile; several ranks have to agree, and do so once in a step
            self.stopped = self._wish()
        if self.stopped:
            control.should_save = True
            control.should_training_stop = True

    def release(self) -> None:
        """Give the signals back, however the training ended."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
