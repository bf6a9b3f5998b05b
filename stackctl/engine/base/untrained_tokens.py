"""Tokens that a base never learned: rows of its embeddings that are still as they were initialised.

A base model's tokenizer has the tokens of a chat template, and its training data had no chats. Their rows look like
those of tokens that nothing ever used, and an adapter that does not train them cannot learn to begin or end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from stackctl.core.schema import Base
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.data.chat_template import CHATML

_RESERVED = re.compile(r"reserved|unused|extra_?\d|placeholder|dummy|\bpad\d", re.IGNORECASE)
_ORDINARY = (
    "The sea was calm that morning, and people of the town walked along the shore as they had always done. "
    "What is it that we want to know? There are 365 days in a year; 12 months, 7 days a week (0, 1, 2, 3, 4, 5, 6). "
    "In the first place, one must say how it works: if you call a function, it returns a value. def main(): return x"
)
"""A text whose tokens every language model has seen many times over."""
_FEWEST = 8
"""How many rows of a kind it takes to tell how they lie."""
_ENOUGH = 256
"""How many are looked at."""
_APART = 0.95
"""The share of rows in use that have to lie elsewhere than the unused ones, for the two to be told apart at all."""


def reference_tokens(tokenizer: Any, rows: int) -> tuple[list[int], list[int]]:
    """Numbers of tokens that are surely used and of rows that surely are not, of ``rows`` rows in all.

    Unused are the rows beyond the tokenizer's last token, and added tokens that are reserved by their names.
    """
    added = tokenizer.get_added_vocab()
    used = {i for i in tokenizer(_ORDINARY, add_special_tokens=False)["input_ids"] if i < rows} - set(added.values())
    last = max(tokenizer.get_vocab().values(), default=-1)
    unused = {*range(last + 1, rows), *(i for token, i in added.items() if _RESERVED.search(token) and i < rows)}
    return sorted(used), sorted(unused)


def find_untrained(tokenizer: Any, base: Base, layout: BaseLayout) -> list[str]:
    """The added tokens of a base's chat template (ChatML's where there is none), and its end of text, that it never
    learned, by rows that are read from its files."""
    names = [f"{name}.weight" for name in (base.input_embedding, base.output_embedding) if name]
    groups = [group for name in names if (group := layout.group(name)) and group.is_plain]
    stored = [next(iter(group.sources)) for group in groups]
    # CPM-Ant's embedding has rows for prompts besides, of which its head has none.
    rows = min([base.vocabulary_size, *(layout.tensors[name][1].shape[0] for name in stored)])
    used, unused = reference_tokens(tokenizer, rows)
    used, unused = used[:_ENOUGH], unused[:_ENOUGH]
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else CHATML
    known = tokenizer.get_added_vocab().items()
    tokens = {i: token for token, i in known if i < rows and (token in template or i == tokenizer.eos_token_id)}
    wanted = [*used, *unused, *tokens]
    if min(len(used), len(unused)) < _FEWEST or not tokens or not groups:
        return []
    matrices = [layout.read_rows(name, wanted) for name in stored]
    place = {number: index for index, number in enumerate(wanted)}
    found = untrained_tokens(
        matrices, [place[n] for n in tokens], [place[n] for n in used], [place[n] for n in unused]
    )  # fmt: skip
    return [tokens[wanted[index]] for index in found]


def untrained_tokens(
    matrices: Sequence[Tensor], tokens: Collection[int], used: Sequence[int], unused: Sequence[int]
) -> list[int]:
    """Those of ``tokens`` whose rows lie where the unused ones lie, and where those in use do not.

    Args:
        matrices: the embeddings (rows, width), and the head's weight where it is another.
        tokens: numbers of the tokens to look at.
        used: numbers of tokens that are surely used; ``unused``: of rows that surely are not.

    A row's place is its distance from the mean of the unused rows. Rows that were initialised at random have that
    distance alike, rows that were all set to one value have none; training moves a row away from both. A token is
    untrained if its row is so in one of the matrices. Where there are fewer than eight rows of a kind, or the two kinds
    lie alike, nothing can be told of a matrix, and nothing is.
    """
    found = set[int]()
    used, unused = [i for i in used if i not in unused], list(unused)
    if min(len(used), len(unused)) < _FEWEST:
        return []
    wanted = sorted(tokens)
    for matrix in matrices:
        with torch.no_grad():
            middle = matrix[unused].float().mean(0)
            low, high = _range((matrix[unused].float() - middle).norm(dim=1))
            elsewhere = (matrix[used].float() - middle).norm(dim=1)
            if float(((elsewhere < low) | (elsewhere > high)).float().mean()) < _APART:
                continue
            own = (matrix[wanted].float() - middle).norm(dim=1)
        found |= {token for token, place in zip(wanted, own.tolist(), strict=True) if low <= place <= high}
    return sorted(found)


def _range(distances: Tensor) -> tuple[float, float]:
    """Where rows lie, with some room on both sides."""
    low, high = float(distances.min()), float(distances.max())
    room = 0.1 * high + 1e-6
    return low - room, high + room
