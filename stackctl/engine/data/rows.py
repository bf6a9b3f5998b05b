"""Rows of documents, and batches without padding."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stackctl.engine.data.examples import IGNORED, Example, LazySequence, TaughtExample

_FEW = 32
TEACHER = "teacher_"
"""What the keys of a micro-batch begin with that a teacher reads."""


def lengths_of(examples: Sequence[Example]) -> np.ndarray:
    """The tokens of each example; a store on disk knows them without reading it."""
    known = getattr(examples, "lengths", None)
    return known() if known else np.array([len(example.input_ids) for example in examples], np.int64)


_OF_RECORDS = ("references", "desired")
"""What a micro-batch of answers has for each of them."""


def longest_of(examples: Sequence[Example]) -> int:
    """The tokens of the longest example, of a teacher's as well."""
    return examples.longest() if isinstance(examples, TaughtExamples) else int(lengths_of(examples).max())


class TaughtExamples(LazySequence[Example]):
    """Examples that each have one for the teacher behind them, as ``EncodeOptions.system`` makes them."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples) // 2

    def lengths(self) -> np.ndarray:
        """The tokens of each, without the teacher's."""
        return lengths_of(self._examples)[::2]

    def longest(self) -> int:
        """The tokens of the longest that anybody reads."""
        return int(lengths_of(self._examples).max())

    def _item(self, number: int) -> TaughtExample:
        own, teacher = self._examples[2 * number : 2 * number + 2]
        return TaughtExample(own.input_ids, own.labels, own.desired, teacher)


class Rows(LazySequence[list[Example]]):
    """What one place of a micro-batch holds: one example, or a packed sequence of several. Read when it is asked for.

    ``order`` are the examples' numbers, row by row; row ``n`` has those from ``starts[n]`` to ``starts[n + 1]``.
    """

    def __init__(self, examples: Sequence[Example], order: np.ndarray, starts: np.ndarray) -> None:
        self._examples = examples
        self._order, self._starts = order, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def of(self, examples: Sequence[Example]) -> Rows:
        """The same rows of others, one for each."""
        return Rows(examples, self._order, self._starts)

    def lengths(self) -> np.ndarray:
        """The tokens of each row."""
        return np.add.reduceat(lengths_of(self._examples)[self._order], self._starts[:-1])

    def _item(self, number: int) -> list[Example]:
        numbers = self._order[self._starts[number] : self._starts[number + 1]]
        return [self._examples[int(number)] for number in numbers]


def one_by_one(examples: Sequence[Example]) -> Rows:
    """A row for each example."""
    return Rows(examples, np.arange(len(examples)), np.arange(len(examples) + 1))


def pairs_of(examples: Sequence[Example]) -> Rows:
    """A row for each two that follow one another."""
    return Rows(examples, np.arange(len(examples)), np.arange(0, len(examples) + 1, 2))


def pack(examples: Sequence[Example], max_length: int) -> Rows:
    """Rows of at most ``max_length`` tokens, filled by best fit, the longest examples first.

    Examples stay whole and apart (attention keeps inside each). Deterministic: rows are ordered by their first
    example, and the examples in a row stand in the order in which they came. Memory holds a few numbers for each
    example, never its tokens; time is that of sorting.

    Raises:
        ValueError: an example is longer than a row; ``encode(..., split_long=True)`` makes none.
    """
    lengths = lengths_of(examples)
    if len(lengths) and lengths.max() > max_length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit into a row of {max_length}")
    row_of: np.ndarray = np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # by what is left, each a heap
    any_open = 0  # bit n is set when a row has n left
    count = 0
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        if fits := any_open >> length:
            left = length + (fits & -fits).bit_length() - 1
            row = heapq.heappop(open_rows[left])
            if not open_rows[left]:
                any_open ^= 1 << left
        else:
            left, row, count = max_length, count, count + 1
        row_of[index] = row
        if left > length:
            heapq.heappush(open_rows[left - length], row)
            any_open |= 1 << (left - length)
    return _in_order(examples, row_of, count)


def _in_order(examples: Sequence[Example], row_of: np.ndarray, count: int) -> Rows:
    """Rows by their first example, and in a row the examples as they came."""
    first = np.full(count, len(row_of))
    np.minimum.at(first, row_of, np.arange(len(row_of)))
    place: np.ndarray = np.empty(count, np.int64)
    place[np.argsort(first)] = np.arange(count)
    rows = place[row_of]
    sizes = np.bincount(rows, minlength=count)
    return Rows(examples, np.argsort(rows, kind="stable"), np.concatenate([[0], np.cumsum(sizes)]))


def collate(rows: Sequence[Example]) -> dict[str, Tensor]:
    """One micro-batch laid out in a single row, T tokens, without padding.

    Returns ``input_ids`` (1, T); ``position_ids`` (1, T), restarting at 0 for each example; ``keep`` (K,), the
    positions whose logits are needed, each the one before a supervised token of the same example; ``labels`` (K,),
    the tokens to predict there.

    transformers keeps the examples apart by their restarting positions only when the model gets neither an attention
    mask nor a cache, and it makes a cache unless told not to: without ``use_cache=False`` they see one another.

    Where a teacher reads other examples, ``teacher_input_ids`` and the like are theirs.
    """
    if theirs := [row.teacher for row in rows if isinstance(row, TaughtExample) and row.teacher]:
        read = {TEACHER + key: value for key, value in collate(theirs).items() if key != "labels"}
        return collate([Example(row.input_ids, row.labels) for row in rows]) | read
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    labels: list[int] = []
    for example in rows:
        before = len(ids) - 1
        for position, label in enumerate(example.labels):
            if position and label != IGNORED:
                keep.append(before + position)
                labels.append(label)
        ids += example.input_ids
        positions += range(len(example.input_ids))
    return {
        "input_ids": torch.tensor([ids], dtype=torch.int64),
        "position_ids": torch.tensor([positions], dtype=torch.int64),
        "keep": torch.tensor(keep, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }


def few_tokens(example: Example) -> dict[str, Tensor]:
    """The first tokens of an example as a micro-batch, for a look at what a model does with it."""
    ids = example.input_ids[:_FEW]
    return collate([Example(ids, [IGNORED, *ids[1:]])])


def starts_of(positions: Tensor) -> list[int]:
    """Where the records of a row (1, T) begin, by its positions, and T, where it ends."""
    return [*torch.nonzero(positions[0] == 0).flatten().tolist(), positions.numel()]


def split_row(batch: dict[str, Tensor], most: int, *, together: int = 1) -> list[dict[str, Tensor]]:
    """A collated micro-batch in parts of at most ``most`` tokens, cut between records; a longer record is a part alone.

    Parts are of like length: a short one takes nearly as long as one twice its size.
    ``together``: so many records that follow one another are never parted.
    """
    starts = starts_of(batch["position_ids"])
    count, cuts = len(starts) - 1, [0]
    wanted = starts[count] / math.ceil(starts[count] / most)
    for first in range(together, count, together):
        now, then = (starts[at] - starts[cuts[-1]] for at in (first, min(first + together, count)))
        if then > most or abs(now - wanted) < abs(then - wanted):
            cuts.append(first)
    return [_records(batch, starts, range(first, end)) for first, end in itertools.pairwise([*cuts, count])]


def deal_row(batch: dict[str, Tensor], count: int, most: int, *, together: int = 1) -> list[dict[str, Tensor]]:
    """A collated micro-batch in parts that are computed ``count`` at a time, the longest first.

    They are of like length, as many as can be computed without one that waits, and of at most ``most`` tokens; records
    that follow one another and are ``together``, or one that is longer, are a part alone.
    """
    starts = starts_of(batch["position_ids"])
    records = len(starts) - 1
    groups = [range(first, min(first + together, records)) for first in range(0, records, together)]
    lengths = [starts[group.stop] - starts[group.start] for group in groups]
    wanted = count * math.ceil(starts[-1] / (count * most))
    parts = _dealt(lengths, wanted)
    while any(len(part) > 1 and sum(lengths[n] for n in part) > most for part in parts):
        parts = _dealt(lengths, wanted := wanted + count)
    return [_records(batch, starts, [record for n in sorted(part) for record in groups[n]]) for part in parts]


def _dealt(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Numbers of ``lengths`` in at most ``count`` parts, each given in turn, the longest first, to the one that has
    least (Graham 1969); the fullest part first."""
    parts: list[tuple[int, int, list[int]]] = [(0, number, []) for number in range(count)]
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        total, place, part = parts[0]
        heapq.heapreplace(parts, (total + lengths[number], place, [*part, number]))
    return [part for _, _, part in sorted(parts, key=lambda part: (-part[0], part[1])) if part]


def _records(batch: dict[str, Tensor], starts: Sequence[int], numbers: Sequence[int]) -> dict[str, Tensor]:
    """A collated micro-batch of some of a row's records."""
    keep, labels, tokens, before = [], [], [], 0
    for number in numbers:
        start, end = starts[number], starts[number + 1]
        inside = (batch["keep"] >= start) & (batch["keep"] < end)
        keep.append(batch["keep"][inside] - start + before)
        labels.append(batch["labels"][inside])
        tokens.append(slice(start, end))
        before += end - start
    part = {key: value[list(numbers)] if len(value) else value for key, value in batch.items() if key in _OF_RECORDS}
    for key in ("input_ids", "position_ids"):
        part[key] = torch.cat([batch[key][:, place] for place in tokens], 1)
    return part | {"keep": torch.cat(keep), "labels": torch.cat(labels)}
