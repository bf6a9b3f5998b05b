"""Beginnings that several texts have in common: how long they are, and a row of records that has each of them once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

FEWEST = 4
"""Shared tokens from which on having them once is worth its calls."""

Span = tuple[int, int]


@dataclass(frozen=True)
class SharedRow:
    """Records in a row in which the beginnings that they share stand once.

    The row consists of pieces: ``lengths`` are their tokens, ``paths`` the numbers of those that each record consists
    of. The pieces that no earlier record has are the last of a path, and follow one another from record to record.
    ``tokens`` (U,) are the places of the row's tokens among those of all records one behind another, ``places`` (T,)
    where in the row each of these T stands.
    """

    lengths: list[int]
    paths: list[list[int]]
    tokens: list[int]
    places: list[int]


def common_prefix(one: Sequence[int] | str, other: Sequence[int] | str) -> int:
    """How many first tokens, or characters, two texts share."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def shared_with(before: Sequence[int], ids: Sequence[int]) -> int:
    """The tokens of ``ids`` that need not be computed behind a text that begins alike."""
    tokens = common_prefix(before, ids)
    return tokens if tokens >= FEWEST else 0


def share_beginnings(records: list[list[int]]) -> SharedRow:
    """Lay records (token ids) in the order of their tokens, in which the one before has the longest beginning in
    common with each."""
    order = sorted(range(len(records)), key=lambda number: records[number])
    starts = list(itertools.accumulate(map(len, records), initial=0))
    tokens: list[int] = []
    spans_of: list[list[Span]] = []
    before: list[int] = []
    for number in order:
        ids = records[number]
        shared = shared_with(before, ids)
        own = (len(tokens), len(tokens) + len(ids) - shared)
        spans_of.append([*_first(spans_of[-1], shared), own] if shared else [own])
        tokens += range(starts[number] + shared, starts[number + 1])
        before = ids
    edges = sorted({edge for spans in spans_of for span in spans for edge in span})
    piece_at = {edge: piece for piece, edge in enumerate(edges)}
    places = [0] * starts[-1]
    for number, spans in zip(order, spans_of, strict=True):
        places[starts[number] : starts[number + 1]] = [place for span in spans for place in range(*span)]
    return SharedRow(
        [end - start for start, end in itertools.pairwise(edges)],
        [[piece for start, end in spans for piece in range(piece_at[start], piece_at[end])] for spans in spans_of],
        tokens,
        places,
    )


def _first(spans: Sequence[Span], count: int) -> list[Span]:
    """The first ``count`` tokens of some spans."""
    found = []
    for start, end in spans:
        if count <= 0:
            break
        found.append((start, min(end, start + count)))
        count -= end - start
    return found
