"""KTO's estimate of how far a model is from its reference: answers behind prompts that they do not belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

from stackctl.engine.data import IGNORED, Example


class SwappedAnswers(Sequence[Example]):
    """For each example its prompt with the answer of the nearest one before it whose prompt is another.

    That is y' of the estimate of z in https://arxiv.org/abs/2402.01306, section 4.2, which also goes round at the
    beginning. Where there is one prompt only, answers come from the example before. What is longer than ``max_length``
    tokens is cut. Made when it is asked for; memory holds a number for each example.
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

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        prompt, donor = _prompt(self._examples[index]), self._examples[self._donors[index]]
        start = _start(donor)
        ids = [*prompt, *donor.input_ids[start:]][: self._max_length]
        return Example(ids, [*[IGNORED] * len(prompt), *donor.labels[start:]][: self._max_length])


def _start(example: Example) -> int:
    """Where the answer begins: at the first token that has a label."""
    return next(n for n, label in enumerate(example.labels) if label != IGNORED)


def _prompt(example: Example) -> list[int]:
    return example.input_ids[: _start(example)]
