"""What becomes of a record: a text with the spans to learn, then a sequence of tokens with labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, overload

IGNORED = -100
"""The label of a token that nothing is learned from; torch's own."""


@dataclass(frozen=True)
class EncodeOptions:
    """How records become examples.

    What is longer than ``max_length`` tokens is cut; with ``split_long`` texts are split instead, each piece beginning
    with the last token of the one before it, so that every token is still learned once. ``answers``: of pairs both are
    read, and not the chosen one alone. ``template`` is given to the chat template, after what a record gives to it.
    ``system``: each example is followed by another with the same labels, behind that system prompt.
    """

    max_length: int
    split_long: bool = False
    answers: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""


@dataclass(slots=True)
class Example:
    """One sequence. ``labels`` are as long as ``input_ids`` and not shifted; -100 where nothing is learned.

    ``desired``: what it says is to become likelier, and not less likely, where an objective asks.

    The first label is always -100: nothing stands before it that could predict it.
    """

    input_ids: list[int]
    labels: list[int]
    desired: bool = True

    @property
    def supervised(self) -> int:
        """How many of its tokens have a label."""
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(slots=True)
class TaughtExample(Example):
    """An example, and the one with the same labels that its teacher reads."""

    teacher: Example | None = None


T = TypeVar("T", covariant=True)


class LazySequence(Sequence[T]):
    """Things that are made, or read, when they are asked for. Subclasses have ``__len__`` and ``_item``."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        numbers = range(len(self))[index]
        return self._item(numbers) if isinstance(numbers, int) else [self._item(number) for number in numbers]

    def _item(self, number: int) -> T:
        """One of them, by its number from 0."""
        raise NotImplementedError


@dataclass
class Encoded:
    """What became of the records.

    ``owners[i]`` is the number of the record that ``examples[i]`` comes from; None for examples that lie on disk.
    ``truncated`` counts the records that ``max_length`` cut; ``unsupervised`` holds the numbers of those of which
    nothing to learn was left, and which are dropped. ``supervised_tokens`` are those that contribute to a loss.
    """

    examples: Sequence[Example]
    owners: list[int] | None = None
    truncated: int = 0
    unsupervised: list[int] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    desired: int = 0
    """How many of the examples are desired."""
    notes: list[str] = field(default_factory=list)
    key: str | None = None
    """The digest of all that decides what the examples are, where they were cached."""


@dataclass(slots=True)
class Layout:
    """A text before it is tokenised: the spans (start, end) of characters to learn, in order.

    ``document``: the tokenizer's own special tokens stand before it. ``ends``: an EOS token is learned after it.
    """

    text: str
    spans: list[tuple[int, int]]
    document: bool = False
    ends: bool = False

    @property
    def whole(self) -> bool:
        """Everything is learned."""
        return self.spans == [(0, len(self.text))]


def supervised_count(examples: Iterable[Example]) -> int:
    """How many tokens of some examples have a label that a model can predict."""
    return sum(example.supervised for example in examples)
