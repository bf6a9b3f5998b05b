"""Rows of documents, and batches without padding."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from stackctl.engine.data.examples import IGNORED, Example


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows of at most ``max_length`` tokens, filled by best fit, the longest examples first.

    Examples stay whole and apart (:func:`collate` keeps attention inside each). Deterministic: rows are ordered by
    their first example, and the examples in a row stand in the order in which they came.

    Raises:
        ValueError: an example is longer than a row; ``encode(..., split_long=True)`` makes none.
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].input_ids), index))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for index in order:
        length = len(examples[index].input_ids)
        if length > max_length:
            raise ValueError(f"an example of {length} tokens does not fit into a row of {max_length}")
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(index)
        else:
            left, row = max_length, len(rows)
            rows.append([index])
        bisect.insort(room, (left - length, row))
    return [[examples[index] for index in row] for row in sorted(map(sorted, rows))]


def collate(rows: Sequence[Example]) -> dict[str, Tensor]:
    """One micro-batch laid out in a single row, T tokens, without padding.

    Returns ``input_ids`` (1, T); ``position_ids`` (1, T), restarting at 0 for each example; ``keep`` (K,), the
    positions whose logits are needed, each the one before a supervised token of the same example; ``labels`` (K,),
    the tokens to predict there.

    transformers keeps the examples apart by their restarting positions only when the model gets neither an attention
    mask nor a cache, and it makes a cache unless told not to: without ``use_cache=False`` they see one another.
    """
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
