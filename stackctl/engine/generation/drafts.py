"""Guesses of the next tokens, taken from the text itself, which one pass of the model checks (prompt lookup).

A pass over a few tokens reads the weights once, as a pass over one does. Where the last tokens stood before, those that
followed them there are guessed to follow again: in quotations, lists, code, and whatever repeats itself. What the model
would not have chosen is dropped, so that a text is what it would be without. A. Saxena, Prompt Lookup Decoding (2023),
https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

_SIZES = (2, 1)
"""Tokens in a row that have to have stood before, the longer first."""
_AT_FIRST, _FOR_EACH, _SAVED = 0.3, 0.02, 1.1
"""Passes over one token that may be spent in vain: at first, more for each token, and how many can be saved up."""


class Drafts:
    """What may follow a text, and how many guesses are worth their time by how many were right so far.

    It is decided by counts, never by a clock, so that the same text is made in the same passes. ``costs``: how many
    tokens may be guessed at once, and how much longer a pass is that checks them, in passes over one token. From one
    number to the next when all were right, and back when fewer than half were.
    """

    def __init__(self, ids: Iterable[int], costs: Mapping[int, float]) -> None:
        self._costs = costs
        self._ids: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}  # tokens in a row: the place behind them
        self._balance, self._level = _AT_FIRST, 0
        for token in ids:
            self._add(token)

    def guess(self, most: int) -> list[int]:
        """Up to ``most`` tokens that may follow; none where the last one is new, or guessing has not paid."""
        counts = [count for count, cost in list(self._costs.items())[: self._level + 1] if cost <= self._balance]
        most = min([most, *counts[-1:]]) if counts else 0
        for size in _SIZES if most > 0 else ():
            if (at := self._behind.get(tuple(self._ids[-size:]))) is not None:
                return list(itertools.islice(itertools.cycle(self._ids[at:]), most))
        return []

    def checked(self, guesses: int, tokens: Iterable[int]) -> None:
        """The tokens that a pass gave: one, and as many as were right of its ``guesses``."""
        right = -1
        for token in tokens:
            self._add(token)
            right += 1
        if guesses:
            change = 1 if right == guesses else -1 if right < guesses / 2 else 0
            self._level = max(0, min(self._level + change, len(self._costs) - 1))
        spent = next((cost for count, cost in self._costs.items() if count >= guesses), 0.0) if guesses else 0.0
        self._balance = min(self._balance + right - spent + _FOR_EACH * (right + 1), _SAVED)

    def _add(self, token: int) -> None:
        for size in _SIZES:
            if len(self._ids) >= size:
                self._behind[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)
