"""How likely the tokens of an answer were: the log-softmax of the model's own logits, whatever chose from them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from stackctl.core.errors import Incompatible

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What the first bytes of a character decode to while the others are not there yet."""
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
Scored = tuple[int, float]
"""A token and its log-probability."""
_LEAST = -9999.0
"""What OpenAI's API says of a token without any probability: JSON has no infinity."""


class NotFinite(Incompatible):
    """Logits of an answer are no numbers."""


def not_finite() -> NotFinite:
    """What is said of an answer whose logits are no numbers, which every engine would choose a token by."""
    return NotFinite("what this stack computes is not a finite number", hint="use smaller weights, or --dtype float32")


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer: its bytes, its log-probability in nats, and those of the most likely tokens at its place,
    the likeliest first. ``begin`` counts the characters of the answer before it; of a special token nothing is in it.
    """

    content: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()
    is_special: bool = False
    begin: int = 0


def laid_out(tokens: Sequence[TokenLogprob], start: int) -> list[TokenLogprob]:
    """Tokens with their places in a text from ``start`` on; a part of a character begins where the character does."""
    places = _characters_of(b"".join(one.content for one in tokens if not one.is_special))
    found, at = [], 0
    for one in tokens:
        found.append(replace(one, begin=start + places[at]))
        at += 0 if one.is_special else len(one.content)
    return found


def _characters_of(text: bytes) -> list[int]:
    """For each byte of a text, and for its end, the number of the character that it belongs to.

    What is no UTF-8 becomes characters as in ``text.decode(errors="replace")``; an incremental decoder would hold back
    some of it that can be nothing else (ED A1).
    """
    numbers: list[int] = []
    count = at = 0
    while at < len(text):
        try:
            right, wrong = text[at:].decode(), 0
        except UnicodeDecodeError as error:
            right, wrong = text[at : at + error.start].decode(), error.end - error.start
        sizes = [*(len(character.encode()) for character in right), *([wrong] if wrong else [])]
        numbers += [count + number for number, size in enumerate(sizes) for _ in range(size)]
        count, at = count + len(sizes), at + sum(sizes)
    return [*numbers, count]


class TokenBytes:
    """The bytes that a token stands for; those of an answer joined are its text, but for special tokens.

    A token that is a part of a character has no text of its own: a byte-level tokenizer has a letter for every byte of
    it, one with a byte fallback a token such as ``<0xE6>``.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._letters = _bytes_of_letters()
        self._known: dict[tuple[int, bool], bytes] = {}

    def __call__(self, token: int, first: bool = False) -> bytes:
        """``first``: at the beginning of a text, where some tokenizers leave a space away."""
        key = (token, first)
        if key not in self._known:
            self._known[key] = self._spell(token, first)
        return self._known[key]

    def likely(self, chosen: Scored, top: Sequence[Scored], first: bool) -> TokenLogprob:
        """A token with its log-probability, and the likeliest with theirs."""
        token, logprob = chosen
        told = tuple((self(other, first), max(value, _LEAST)) for other, value in top)
        return TokenLogprob(self(token, first), max(logprob, _LEAST), told, token in self._special)

    def _spell(self, token: int, first: bool) -> bytes:
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is None:  # a row of the model that the tokenizer has no token for
            return b""
        if token in self._special:
            return str(name).encode()
        alone = self._decode([token])
        if INCOMPLETE in alone:
            if byte := _BYTE.fullmatch(name):
                return bytes([int(byte[1], 16)])
            if all(letter in self._letters for letter in name):
                return bytes(self._letters[letter] for letter in name)
        if first:
            return alone.encode()
        twice = self._decode([token, token])
        return (twice[len(alone) :] if twice.startswith(alone) else alone).encode()

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of a byte-level tokenizer stands for: itself where it can be seen, else one beyond.

    ``bytes_to_unicode`` of GPT-2's encoder.py.
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + number): byte for number, byte in enumerate(hidden)}
