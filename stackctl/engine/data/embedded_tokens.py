"""Tokens that a tokenizer has and a base's embeddings have no row for, as where tokens were added to one of the two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from stackctl.core.errors import Incompatible, listed
from stackctl.engine.data.examples import Encoded

_NAMED = 5


def unembedded_tokens(tokenizer: Any, rows: int) -> dict[int, str]:
    """The tokens whose numbers are beyond ``rows``, by number."""
    if len(tokenizer) <= rows:
        return {}
    return {number: token for token, number in sorted(tokenizer.get_vocab().items()) if number >= rows}


def name_tokens(tokens: dict[int, str]) -> str:
    """``<a>, <b> (260 to 261)``"""
    numbers = sorted(tokens)
    shown = listed([tokens[number] for number in numbers], _NAMED)
    return f"{shown} ({numbers[0]} to {numbers[-1]})" if len(numbers) > 1 else f"{shown} ({numbers[0]})"


def check_embedded(encoded: Encoded, beyond: dict[int, str], where: str, unit: str, base: str) -> None:
    """Hold what records became against the tokens that a base has no row for.

    Args:
        beyond: those tokens, by number, as of :func:`unembedded_tokens`.
        where: the data's name; ``unit``: what its records are counted in.
        base: the base's name.

    Raises:
        Incompatible: records use them; the first ones are named.
    """
    owners: Sequence[int] = encoded.owners or range(1, len(encoded.examples) + 1)
    lines: dict[int, None] = {}
    used: dict[int, str] = {}
    for owner, example in zip(owners, encoded.examples, strict=True):
        if found := {number: beyond[number] for number in example.input_ids if number in beyond}:
            lines[owner] = None
            used |= found
    if not lines:
        return
    numbers = list(lines)
    shown = [str(number) for number in numbers[:_NAMED]]
    if len(numbers) > _NAMED:
        shown[-1:] = [shown[-1], f"{len(numbers) - _NAMED} more"]
    named = shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
    subject = f"{unit} {named} of {where} uses" if len(numbers) == 1 else f"{unit}s {named} of {where} use"
    raise Incompatible(
        f"{subject} {name_tokens(used)}, for which the embeddings of '{base}' have no row",
        hint="write them otherwise, or resize the base's embeddings first (transformers: resize_token_embeddings)",
    )


def check_prompt(ids: Iterable[int], rows: int, place: str, tokenizer: Any, base: str) -> None:
    """The same for a prompt, which ``place`` names.

    Raises:
        Incompatible: it uses a token that the base has no row for.
    """
    beyond = sorted({number for number in ids if number >= rows})
    if beyond:
        tokens = dict(zip(beyond, tokenizer.convert_ids_to_tokens(beyond), strict=True))
        raise Incompatible(
            f"{place} uses {name_tokens(tokens)}, for which the embeddings of '{base}' have no row",
            hint="write it otherwise, or resize the base's embeddings first (transformers: resize_token_embeddings)",
        )
