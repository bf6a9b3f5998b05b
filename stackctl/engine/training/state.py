"""What changes while a run trains: Trainer and its callbacks share one :class:`RunState`, and none holds another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stackctl.core import Say
from stackctl.core.errors import Failed
from stackctl.engine.data.encoding import Reading
from stackctl.engine.devices import exact_device, float64
from stackctl.engine.training.distributed import WholeSteps, numbers_of_each
from stackctl.engine.training.preferences import Scores


def not_finite(what: str) -> Failed:
    """The error of a run that has become numbers of no use."""
    return Failed(what, hint="try a lower --learning-rate, or --dtype float32; nothing was registered")


@dataclass
class Counters:
    """What a run has seen so far; it is saved and restored with the run.

    ``loss_sum`` is over supervised tokens, or where there are ``pairs`` over those. ``curve`` has an entry for each
    optimizer step, ``evaluations`` one for each evaluation on held-out records: ``step`` and ``eval_loss``.
    ``broken_step`` is the one at which a loss was no number and the training ended; nothing of it is counted.
    ``moved`` are the fields of :class:`stackctl.core.schema.Moved`, where the adapter moved.
    """

    tokens: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    pairs: int = 0
    """Pairs, or for KTO answers."""
    ranked: float = 0.0
    margin_sum: float = 0.0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    broken_step: int | None = None
    moved: dict[str, Any] | None = None

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on with the counters of a save."""
        for name, value in saved.items():
            setattr(self, name, value)

    @property
    def losses(self) -> list[float]:
        """The loss of each step in nats, NaN of a broken one."""
        if self.broken_step is None:
            return [point["loss"] for point in self.curve]
        return [*(point["loss"] for point in self.curve if point["step"] < self.broken_step), math.nan]

    @property
    def loss(self) -> float:
        count = self.pairs or self.supervised_tokens
        return self.loss_sum / count if count else math.nan

    @property
    def accuracy(self) -> float | None:
        """The share of pairs that were ranked rightly when they were learned from; none without pairs."""
        return self.ranked / self.pairs if self.pairs else None

    @property
    def margin(self) -> float | None:
        """The mean by how much; none without pairs."""
        return self.margin_sum / self.pairs if self.pairs else None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


Progress = Callable[[int, int, Counters], None]


@dataclass(frozen=True)
class RunOutput:
    """How a run speaks with whoever started it.

    ``say`` gets a line for a person, ``progress`` (step, steps, counters) after each step, ``reading`` the share of the
    data that was read, ``comparing`` that of the answers whose reference is known; ``again`` is the command that
    goes on after an interruption.
    """

    say: Say
    progress: Progress
    reading: Reading
    again: str
    comparing: Reading = lambda _: None


@dataclass
class RunState:
    """The counters of the run, the sums of the step that is being computed, and how the run is to end."""

    device: torch.device
    counters: Counters = field(default_factory=Counters)
    evaluating_seconds: float = 0.0
    """Seconds since training began that went into evaluations."""
    stop_signal: int = 0
    """The signal that ends the training after this step, whichever rank got it; else 0."""
    order: WholeSteps | None = None
    """The order of the records where several processes train."""
    step_pairs: dict[str, float] = field(default_factory=dict)
    """Of the last step, where it had answers: ``accuracy``, ``margin``, the mean log-probabilities of each kind."""
    _tokens: int = 0
    _supervised: int = 0

    def __post_init__(self) -> None:
        where = exact_device(self.device)
        self._loss = torch.zeros((), dtype=torch.float64, device=where)
        self._pairs = torch.zeros(7, dtype=torch.float64, device=where)

    def add_answers(self, scores: Scores) -> None:
        """Count the pairs of a micro-batch, or for KTO its answers."""
        margins, kinds = scores.margins, (scores.desired, scores.avoided)
        sums = [scores.ranks.sum(), margins.sum(), *(kind.sum() for kind in kinds)]
        counts = torch.tensor([len(margins), *map(len, kinds)])
        self._pairs += torch.cat([counts.to(self._pairs), float64(torch.stack(sums))])

    def add_loss(self, loss: Tensor) -> None:
        """Add the summed loss (scalar, nats) of a micro-batch, or of a part of it, to that of the step."""
        self._loss += float64(loss.detach())

    def add_micro_batch(self, inputs: dict[str, Any]) -> None:
        """Add the tokens of a micro-batch to those of the step."""
        if inputs["labels"].numel():  # else a place that only keeps the ranks in step
            self._tokens += inputs["input_ids"].numel()
            self._supervised += inputs["labels"].numel()

    def end_step(self, wanted_stop: int) -> float:
        """Count what all ranks computed in this step, and agree on ``stop_signal``.

        Returns the step's mean loss; where that is not a finite number, nothing is counted.
        """
        own = [float(self._loss), *map(float, (self._tokens, self._supervised, wanted_stop)), *self._pairs.tolist()]
        self._loss.zero_()
        self._pairs.zero_()
        self._tokens = self._supervised = 0
        each = numbers_of_each(own, self.device)
        loss, tokens, supervised, _, pairs, chosen, rejected, right, margin, *likely = each.sum(0).tolist()
        self.stop_signal = int(each[:, 3].max())
        if not math.isfinite(loss):
            return math.nan
        self.counters.loss_sum += loss
        self.counters.tokens += int(tokens)
        self.counters.supervised_tokens += int(supervised)
        self.counters.pairs += int(pairs)
        self.counters.ranked += right
        self.counters.margin_sum += margin
        self.step_pairs = {"accuracy": right / pairs, "margin": margin / pairs} if pairs else {}
        kinds = zip(("chosen_logp", "rejected_logp"), likely, (chosen, rejected), strict=True)
        self.step_pairs |= {name: total / count for name, total, count in kinds if count}
        count = pairs or supervised
        return float(loss / count) if count else math.nan
