"""Which beginnings of prompts are computed by now, or are computed once for several of them; and what was, kept."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from stackctl.engine.data.shared_beginnings import FEWEST, common_prefix
from stackctl.machine.resources import main_memory

if TYPE_CHECKING:
    from torch import Tensor


class Text(NamedTuple):
    """Token ids and what computes them besides the base: rows of equal ``weights`` are computed alike."""

    ids: Sequence[int]
    weights: object


@dataclass(frozen=True)
class Prefix:
    """The first ``tokens`` of prompt number ``prompt`` are those of text number ``source``."""

    prompt: int
    source: int
    tokens: int


def shared_prefixes(prompts: Sequence[Text], known: Sequence[Text]) -> list[Prefix]:
    """What each prompt shares with a known text, or with another prompt that is computed in the same pass.

    Sources are numbered through: the known texts, and behind them the prompts. A prompt stands in the list behind its
    source; of each at least one token is left to compute, and what is not worth copying is left out. Each shares as
    much as it can: among texts in the order of their tokens, the longest common beginning is that of a neighbour.
    """
    kinds: list[object] = []
    texts = [*known, *prompts]
    of_kind = [_number(kinds, text.weights) for text in texts]
    prefixes = []
    for kind in range(len(kinds)):
        numbers = [number for number, own in enumerate(of_kind) if own == kind]
        pool = sorted((list(texts[number].ids), number) for number in numbers if number < len(known))
        for one in sorted((list(texts[number].ids), number) for number in numbers if number >= len(known)):
            ids, number = one
            place = bisect.bisect(pool, one)
            beside = pool[max(0, place - 1) : place + 1]
            tokens, source = max(((common_prefix(ids, other), source) for other, source in beside), default=(0, 0))
            tokens = min(tokens, len(ids) - 1)
            if tokens >= FEWEST:
                prefixes.append(Prefix(number - len(known), source, tokens))
            pool.insert(place, one)
    return prefixes


def _number(kinds: list[object], weights: object) -> int:
    if weights not in kinds:
        kinds.append(weights)
    return kinds.index(weights)


_SHARE = 8
"""They take one part in so many of the free memory, no more."""


class FinishedTexts:
    """The ``most`` texts that were used last; fewer where the memory is short."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._kept: list[tuple[Text, Tensor]] = []

    @property
    def texts(self) -> list[Text]:
        return [text for text, _ in self._kept]

    @property
    def seen(self) -> list[Tensor]:
        """The keys and values of each: (layers, 2, heads, tokens, head width)."""
        return [seen for _, seen in self._kept]

    def use(self, numbers: Collection[int]) -> None:
        """Some are gone on from now: they stay longest."""
        self._kept = [self._kept[at] for at in sorted(range(len(self._kept)), key=lambda at: at in numbers)]

    def add(self, text: Text, seen: Tensor) -> None:
        """Keep one more, in place of what it goes on from."""
        self._kept = [(old, held) for old, held in self._kept if not _goes_on(text, old)] + [(text, seen)]
        sizes = [held.nbytes for _, held in self._kept]
        limit = (main_memory().available + sum(sizes)) // _SHARE
        while len(sizes) > self.most or sum(sizes) > limit:
            del self._kept[0], sizes[0]


def _goes_on(text: Text, old: Text) -> bool:
    return text.weights == old.weights and common_prefix(text.ids, old.ids) == len(old.ids)
