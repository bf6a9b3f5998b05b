"""The log-probabilities of answers under the frozen stack, computed before the first step and kept for the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from stackctl.core.errors import Usage, VerificationFailed
from stackctl.core.train_job import TrainJob
from stackctl.engine.at_once import AtOnce
from stackctl.engine.data.examples import IGNORED, Encoded, Example, LazySequence
from stackctl.engine.evaluation.scoring import record_losses
from stackctl.engine.training.objectives import OBJECTIVES
from stackctl.engine.training.preferences import KnownAnswers
from stackctl.engine.training.proofs import new_adapter_off
from stackctl.jobs.job_checks import WITHOUT_SFT
from stackctl.registry.garbage_collection import tokens_folder
from stackctl.storage import atomic

_LOOKED_AT = 8
"""Answers that are computed on every run: with the new adapter at zero, which changes nothing, and at the end."""
_CHUNK = 32
"""Answers between two words on how far this is."""
_SAME = 1e-3
"""How far (nats, relative) a kept log-probability may be from the one of today: other threads round otherwise."""
_FILE = "log_probabilities.npy"


@dataclass
class ReferenceModel:
    """A model whose frozen stack is the reference: it is what is left with the new adapter off.

    ``live`` is the frozen stack's name in it, where it is not folded. ``at_zero``: the new adapter has no effect yet.
    ``stands_on`` is everything besides the data that decides what is computed: base, members, weights, precision.
    ``at_once`` computes several rows of answers before the training.
    """

    model: PeftModel
    live: str | None
    at_zero: bool
    bfloat16: bool
    stands_on: list[Any]
    comparing: Callable[[float], None] = lambda _: None
    at_once: AtOnce | None = None
    _first: list[float] = field(default_factory=list)

    def know(self, encoded: Encoded, job: TrainJob, max_length: int, *, held_out: bool = False) -> KnownAnswers:
        """What an objective has to know of answers beforehand; of ``held_out`` ones in float32, as they are measured.

        Raises:
            VerificationFailed: the new adapter, at zero, changes a log-probability.
        """
        examples, bfloat16 = encoded.examples, self.bfloat16 and not held_out
        with self._computing(bfloat16):
            first = self._compute(examples[: min(_LOOKED_AT, len(examples))])
            if not held_out:
                self._first = first
            if not OBJECTIVES[job.objective].compares:
                return KnownAnswers(examples, [0.0] * len(examples))
            given = self._log_probabilities(examples, self._place(encoded, "given", bfloat16), first)
            if job.objective != "kto":
                return KnownAnswers(examples, given)
            mismatched = MismatchedAnswers(examples, max_length)
            place = self._place(encoded, f"swapped, {max_length}", bfloat16)
            first = self._compute(mismatched[: min(_LOOKED_AT, len(mismatched))])
            swapped = KnownAnswers(mismatched, self._log_probabilities(mismatched, place, first))
            return KnownAnswers(examples, given, swapped)

    def changes(self, examples: Sequence[Example]) -> dict[bool, float]:
        """By how much (nats) the first answers became likelier, on average: those desired, and those to be avoided."""
        some = examples[: len(self._first)]
        with self._computing(self.bfloat16):
            now = [-loss for loss in record_losses(self.model, some)]
        gains: dict[bool, list[float]] = {}
        for example, before, after in zip(some, self._first, now, strict=True):
            gains.setdefault(example.desired, []).append(after - before)
        return {kind: sum(values) / len(values) for kind, values in gains.items()}

    @contextlib.contextmanager
    def _computing(self, bfloat16: bool) -> Iterator[None]:
        with torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=bfloat16):
            yield

    def _compute(self, examples: Sequence[Example]) -> list[float]:
        with new_adapter_off(self.model, self.live):
            return self._as_it_stands(examples)

    def _as_it_stands(self, examples: Sequence[Example]) -> list[float]:
        return [-loss for loss in record_losses(self.model, examples, self.at_once)]

    def _log_probabilities(self, examples: Sequence[Example], place: Path | None, first: list[float]) -> list[float]:
        """The log-probability (nats) of each answer under the frozen stack, of which the ``first`` are known.

        They are kept from another run if it is the same.
        """
        found = list(first)
        if self.at_zero and self._as_it_stands(examples[: len(first)]) != first:
            raise VerificationFailed(
                "the new adapter changes log-probabilities before its first step: the margins are not zero, "
                "and the reference is not the frozen stack"
            )
        if place and (kept := _read(place, len(examples))) and np.allclose(kept[: len(found)], found, _SAME, _SAME):
            return kept
        for start in range(len(first), len(examples), _CHUNK):
            self.comparing(start / len(examples))
            found += self._compute(examples[start : start + _CHUNK])
        self.comparing(1.0)
        if place:
            _write(place, found)
        return found

    def _place(self, encoded: Encoded, what: str, bfloat16: bool) -> Path | None:
        """Where such numbers are kept; nowhere for data that is not."""
        if encoded.key is None:
            return None
        device = next(self.model.parameters()).device
        parts = [encoded.key, what, bfloat16, self.live, device.type, torch.__version__, *self.stands_on]
        return tokens_folder() / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def fallen(changes: dict[bool, float], objective: str) -> str | None:
    """What to know where both kinds of answers became less likely, each by so much (nats) on average."""
    if len(changes) < 2 or max(changes.values()) >= 0:
        return None
    told = (
        "both kinds of answers became less likely than under the frozen stack: those preferred by "
        f"{-changes[True]:.3g} nats, the others by {-changes[False]:.3g}"
    )
    return told if objective in WITHOUT_SFT else f"{told}; --sft-weight holds the preferred ones up"


def _read(place: Path, count: int) -> list[float] | None:
    try:
        found = np.load(place / _FILE, allow_pickle=False)
        os.utime(place)
    except (OSError, ValueError, EOFError):
        return None
    whole = found.shape == (count,) and found.dtype == np.float64 and np.isfinite(found).all()
    return found.tolist() if whole else None


def _write(place: Path, numbers: Sequence[float]) -> None:
    with contextlib.suppress(OSError), atomic.staging_directory(place.parent) as staged:
        np.save(staged / _FILE, np.array(numbers, np.float64))
        if place.exists():  # what lies there is damaged, or was computed otherwise
            atomic.discard_folder(place)
        with contextlib.suppress(Usage):  # another run was quicker
            atomic.publish_directory(staged, place)


class MismatchedAnswers(LazySequence[Example]):
    """For each example its prompt with the answer of the nearest one before it whose prompt is another.

    KTO estimates by them how far a model is from its reference: they are y' of z in https://arxiv.org/abs/2402.01306,
    section 4.2, which also goes round at the beginning. Where there is one prompt only, answers come from the example
    before. What is longer than ``max_length`` tokens is cut. Memory holds a number for each example.
    """

    def __init__(self, examples: Sequence[Example], max_length: int) -> None:
        self._examples, self._max_length = examples, max_length
        prompts = [hash(tuple(_prompt(example))) for example in examples]
        last = len(prompts) - 1
        self._donors = [last] * len(prompts)
        if len(set(prompts)) == 1:
            self._donors = [number - 1 if number else last for number in range(len(prompts))]
            return
        before = next(n for n in range(last, -1, -1) if prompts[n] != prompts[0])
        for number, prompt in enumerate(prompts):
            if number and prompts[number - 1] != prompt:
                before = number - 1
            self._donors[number] = before

    def __len__(self) -> int:
        return len(self._examples)

    def _item(self, number: int) -> Example:
        prompt, donor = _prompt(self._examples[number]), self._examples[self._donors[number]]
        start = _start(donor)
        ids = [*prompt, *donor.input_ids[start:]][: self._max_length]
        return Example(ids, [*[IGNORED] * len(prompt), *donor.labels[start:]][: self._max_length])


def _start(example: Example) -> int:
    """Where the answer begins: at the first token that has a label."""
    return next(n for n, label in enumerate(example.labels) if label != IGNORED)


def _prompt(example: Example) -> list[int]:
    return example.input_ids[: _start(example)]
