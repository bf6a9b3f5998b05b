"""Held-out records during a run: their loss at intervals, the weights that were best, and when to stop.

Trainer decides when to evaluate (``eval_steps``) and reports what was found. Which weights were best is kept here, in
memory and with each save: Trainer would save optimizer and all at every evaluation, and load the best weights into the
first active adapter, which may be a frozen one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackctl.core import Say
from stackctl.core.train_job import TrainJob
from stackctl.engine.at_once import AtOnce
from stackctl.engine.data.examples import Example, supervised_count
from stackctl.engine.evaluation.scoring import record_losses
from stackctl.engine.training.adapter import trained_parameters
from stackctl.engine.training.distributed import numbers_of_each, share_of
from stackctl.engine.training.state import Counters, not_finite

Measure = Callable[[nn.Module], dict[str, float]]
"""What held-out records say of a model: ``eval_loss``, and whatever belongs to it."""
_EVALUATIONS = 10
"""How often a run is evaluated unless told otherwise."""
_BEST = "best_{rank}.safetensors"


def evaluation_steps(job: TrainJob, steps: int) -> int:
    """Optimizer steps between two evaluations."""
    return job.eval_steps or max(1, steps // _EVALUATIONS)


class HeldOut(TrainerCallback):
    """The held-out records of a run.

    ``evaluations`` has an entry for each: ``step`` and ``eval_loss``, by :func:`held_out_loss` or what else ``measure``
    finds, ``eval_accuracy`` and ``eval_margin`` of answers; the first is of step 0, before anything is learned. The
    list is that of the run's counters, with which it is saved and restored. Weights are kept from step ``first`` on.
    """

    def __init__(self, job: TrainJob, counters: Counters, say: Say, measure: Measure, *, first: int = 1) -> None:
        self._measure, self._first = measure, first
        self._keeps_best = job.keep == "best"
        self._patience = job.patience
        self._counters = counters
        self._say = say
        self._best: dict[str, Tensor] = {}

    @property
    def evaluations(self) -> list[dict[str, float]]:
        return self._counters.evaluations

    # -- what was found -------------------------------------------------------------------------------------------

    @property
    def best(self) -> dict[str, float] | None:
        """The evaluation with the lowest loss, the earliest of equal ones, of those with something to keep."""
        return min(self._learned, key=lambda e: e["eval_loss"], default=None)

    @property
    def _learned(self) -> list[dict[str, float]]:
        return [e for e in self.evaluations if e["step"] >= self._first]

    @property
    def kept(self) -> dict[str, float]:
        """The evaluation of the weights that are registered."""
        return self.best if self._keeps_best and self.best else self.evaluations[-1]

    @property
    def is_over(self) -> bool:
        """Whether a loss was no number, or ``patience`` evaluations in a row found nothing better."""
        if self._counters.broken_step is not None:
            return True
        learned = self._learned
        if self._patience is None or self.best is None:
            return False
        return len(learned) - 1 - learned.index(self.best) >= self._patience

    # -- evaluating -----------------------------------------------------------------------------------------------

    def evaluate(self, wrapped: nn.Module, model: nn.Module, step: int) -> dict[str, float]:
        """What the model as it stands comes to; ``wrapped`` is what runs it over all processes.

        Each process reads its share, and all of them know the result.

        Raises:
            Failed: the loss is no number.
        """
        found = self._measure(wrapped)
        if not math.isfinite(found["eval_loss"]):
            if self.end_with_best(step):
                return found
            raise not_finite(f"the held-out loss after step {step} is not a finite number")
        self.evaluations.append({"step": step, **found})
        ranks_right = f", ranked rightly {found['eval_accuracy']:.1%}" if "eval_accuracy" in found else ""
        self._say(f"step {step}: held-out loss {found['eval_loss']:.3f}{ranks_right}")
        self._look_for_mark(step, found["eval_loss"])
        if self._keeps_best and self.best is self.evaluations[-1]:
            self._best = {name: _local(p).detach().to("cpu", copy=True) for name, p in trained_parameters(model)}
        return found

    def _look_for_mark(self, step: int, loss: float) -> None:
        """Tell when an adapter that moved is as good as it was where it stood before."""
        moved = self._counters.moved
        if moved and moved["mark"] is not None and moved["reached_step"] is None and loss <= moved["mark"]:
            moved["reached_step"] = step
            self._say(f"step {step}: as good as it was where it stood, {moved['mark']:.3f}")

    def end_with_best(self, step: int) -> bool:
        """End the run at a loss that is no number, if there are best weights to go back to. Returns whether it did."""
        best = self.best if self._keeps_best else None
        if best is None:
            return False
        self._counters.broken_step = step
        self._say(f"the loss of step {step} is not a finite number: back to the weights of step {best['step']}")
        return True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step >= state.max_steps and self._counters.broken_step is None:
            control.should_evaluate = True  # whatever the interval: the last weights are

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.is_over:
            control.should_training_stop = True

    # -- the best weights -----------------------------------------------------------------------------------------

    def use_kept(self, model: nn.Module) -> None:
        """Put the weights that are to be registered into the model."""
        with torch.no_grad():
            for name, parameter in trained_parameters(model) if self._best else ():
                _local(parameter).copy_(self._best[name])

    def save(self, folder: Path, rank: int) -> None:
        """Write the best weights so far beside a save; with sharding each process has a part of them."""
        if self._best:
            save_file(self._best, folder / _BEST.format(rank=rank))

    def load(self, folder: Path, rank: int) -> None:
        file = folder / _BEST.format(rank=rank)
        self._best = load_file(file) if file.is_file() else {}


def held_out_loss(model: nn.Module, examples: Sequence[Example], at_once: AtOnce | None = None) -> dict[str, float]:
    """``eval_loss``, the mean cross-entropy (nats) over supervised tokens; each process reads its share."""
    places, real = share_of(len(examples))
    chosen = [examples[place] for place in places]
    losses = record_losses(model, chosen, at_once)
    own = [math.fsum(losses[:real]), float(supervised_count(chosen[:real]))]
    total, tokens = numbers_of_each(own, next(model.parameters()).device).sum(0).tolist()
    return {"eval_loss": total / max(tokens, 1.0)}


def _local(parameter: Tensor) -> Tensor:
    """This process's part of a parameter that is sharded as a DTensor; else all of it."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
