"""Texts whose rows have left a batch, with their keys and values, for prompts that go on from them."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from stackctl.engine.generation.shared_prefixes import Text, common
from stackctl.machine.resources import main_memory

if TYPE_CHECKING:
    from torch import Tensor

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
    return text.weights == old.weights and common(text.ids, old.ids) == len(old.ids)
