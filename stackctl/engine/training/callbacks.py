"""What happens after every optimizer step: counting, the loss curve, and an end by Ctrl-C or SIGTERM."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackctl.core import Say
from stackctl.engine.training.early_stopping import HeldOut
from stackctl.engine.training.state import Progress, RunState, not_finite
from stackctl.jobs import ranks


class StepCallback(TrainerCallback):
    """Counts steps, keeps the loss curve, stops at a loss that is no number, and lets Ctrl-C end a step in peace."""

    def __init__(self, run: RunState, progress: Progress, say: Say, held_out: HeldOut | None) -> None:
        self._run, self._progress, self._say, self._held_out = run, progress, say, held_out
        self._started = self._seconds_before = self._rate = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._asked = 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with contextlib.suppress(ValueError):  # not in the main thread
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        self._run.evaluating_seconds = 0.0
        self._seconds_before = self._run.counters.seconds
        self._started = time.perf_counter()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say whose order is wanted: where several ranks resume in mid-epoch, accelerate's skipping does not."""
        if self._run.order:
            self._run.order.set_epoch(int(state.epoch or 0))

    def _on_signal(self, number: int, _: object) -> None:
        if self._asked and not ranks.is_launched():  # a launcher passes on what the terminal has sent already
            raise KeyboardInterrupt
        self._asked = number
        with contextlib.suppress(RuntimeError):  # it came while something was written, which cannot be entered twice
            self._say(f"note: {ranks.ENDING}")

    def _wanted_stop(self) -> int:
        """The signal by which this rank was asked to stop; 0 when it was not."""
        linked = ranks.link()
        word = linked.stop if linked else None
        return self._asked or {"interrupt": signal.SIGINT, "terminate": signal.SIGTERM}.get(word or "", 0)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """The rate that this step is taken with; afterwards the schedule shows the next one's."""
        self._rate = float(optimizer.param_groups[0]["lr"]) if optimizer is not None else 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        run, counters = self._run, self._run.counters
        loss = run.end_step(self._wanted_stop())
        counters.seconds = self._seconds_before + time.perf_counter() - self._started - run.evaluating_seconds
        if not math.isfinite(loss):
            self._end_broken(state.global_step, control)
            return
        counters.curve.append(
            {"step": state.global_step, "loss": loss, "learning_rate": self._rate, "tokens": counters.tokens}
            | run.step_pairs
        )
        self._progress(state.global_step, state.max_steps, counters)
        if args.world_size == 1:  # what came meanwhile; several ranks have to agree, and do so once in a step
            run.stop_signal = self._wanted_stop()
        if run.stop_signal:
            control.should_save = True
            control.should_training_stop = True

    def _end_broken(self, step: int, control: TrainerControl) -> None:
        """End at a loss that is no number: with the best weights so far, where those were kept.

        Raises:
            Failed: they were not.
        """
        if self._held_out is None or not self._held_out.end_with_best(step):
            raise not_finite(f"the loss of step {step} is not a finite number")
        control.should_evaluate = control.should_save = False
        control.should_training_stop = True

    def release_signals(self) -> None:
        """Give the signals back, however the training ended."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
