"""Where an answer ends: at a token, at a text, or at its greatest length. Tokens become text here, as they come."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stackctl.engine.data.turns import end_of_turn
from stackctl.engine.generation.logprobs import INCOMPLETE, TokenLogprob, laid_out
from stackctl.engine.generation.reader import Reader
from stackctl.engine.generation.sampling import Sampling

if TYPE_CHECKING:
    from torch import Tensor

OnText = Callable[[str], object]
"""Told an answer's text as it comes, piece by piece."""


def end_tokens(reader: Reader) -> list[int]:
    """Every token that ends an answer: the tokenizer's and the base's EOS, and the chat template's end of turn."""
    found = {reader.tokenizer.eos_token_id}
    configured = getattr(reader.generation_config, "eos_token_id", None)
    found.update(configured if isinstance(configured, list) else [configured])
    turn = _end_of_turn_ids(reader)
    if len(turn) == 1:
        found.add(turn[0])
    return sorted(token for token in found if token is not None)


@dataclass(frozen=True)
class Endings:
    """What ends an answer besides its length: tokens, and texts. ``turn`` is the end of turn where it is a text of
    several tokens (ChatML on a base without it), ``template`` the chat template that says so."""

    tokens: Sequence[int] = ()
    texts: Sequence[str] = ()
    turn: str = ""
    template: str | None = None


def endings_of(reader: Reader, sampling: Sampling) -> Endings:
    """By the chat template that the tokenizer has now."""
    is_text = not sampling.raw and len(_end_of_turn_ids(reader)) > 1
    turn = end_of_turn(reader.tokenizer) if is_text else ""
    return Endings(end_tokens(reader), sampling.stop, turn, reader.tokenizer.chat_template)


def _end_of_turn_ids(reader: Reader) -> list[int]:
    if not reader.tokenizer.chat_template:
        return []
    ids: list[int] = reader.tokenizer(end_of_turn(reader.tokenizer), add_special_tokens=False)["input_ids"]
    return ids


class TokenText:
    """The text of tokens that come one by one, in time that does not grow with what came before.

    Only the last tokens are decoded, with the piece before them, because some tokenizers write a token differently at
    the beginning. The pieces joined are what decoding all tokens at once gives.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last piece that was given out, and what came since
        self._given = 0
        self._before = ""

    def add(self, token: int) -> str:
        """What is now certain to follow; nothing while a character is incomplete."""
        self._ids.append(token)
        text = decode(self._tokenizer, self._ids)
        if text.endswith(INCOMPLETE) or len(text) <= len(self._before):
            return ""
        new = text[len(self._before) :]
        self._ids, self._given = self._ids[self._given :], len(self._ids) - self._given
        self._before = decode(self._tokenizer, self._ids)
        return new

    def rest(self) -> str:
        """What is left at the end, characters that stayed incomplete among it."""
        return decode(self._tokenizer, self._ids)[len(self._before) :]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Tokens as text, without special ones, and with every space as it was written."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class Answer:
    """One answer while it is written. ``stop`` is ``end``, ``stop`` or ``length`` once it is finished.

    With ``on_text`` its text is handed on piece by piece, and never a part of a text that ends it: what could be the
    beginning of one is held back until it is clear that it is not. Without a tokenizer its text comes in pieces, from
    an engine that decodes by itself. ``is_left``: whether nobody waits for it any more.
    """

    def __init__(self, tokenizer: Any, endings: Endings, on_text: OnText | None) -> None:
        self._tokenizer, self._ends, self._on_text = tokenizer, endings.tokens, on_text
        self._reasons = {**({endings.turn: "end"} if endings.turn else {}), **dict.fromkeys(endings.texts, "stop")}
        self._tokens = TokenText(tokenizer) if tokenizer is not None and (on_text or self._reasons) else None
        self._text = ""
        self._shown = 0
        self._cut = False
        self._logprobs: list[TokenLogprob] = []
        self._unplaced: list[TokenLogprob] = []
        self._told = 0
        self.ids: list[int] = []
        self.stop = ""
        self.is_left: Callable[[], bool] = lambda: False

    def add(self, token: int, logprob: TokenLogprob | None = None) -> None:
        """The next token, and how likely it was; what comes after the end counts for nothing."""
        if self.stop:
            return
        if token in self._ends:
            self.finish("end")
            return
        self.ids.append(token)
        if logprob is not None:
            self._unplaced.append(logprob)
        if self._tokens is not None and (piece := self._tokens.add(token)):
            self._take(piece)

    def add_piece(self, text: str, tokens: Sequence[int], logprobs: Sequence[TokenLogprob] = ()) -> None:
        """More of an answer whose text comes in pieces, and the last tokens that it was decoded from."""
        if not self.stop and any(token in self._ends for token in tokens):
            self.finish("end")
        if not self.stop:
            self._unplaced += logprobs
        if not self.stop and text:
            self._take(text)

    def finish(self, reason: str = "length") -> None:
        """End the answer, if nothing in what is left of its text ends it earlier."""
        if not self.stop and self._tokens is not None and (rest := self._tokens.rest()):
            self._take(rest)
        if not self.stop:
            self.stop = reason
            self._place()
            self._show(len(self._text))

    @property
    def text(self) -> str:
        whole = self._tokens is None and self._tokenizer is not None
        return decode(self._tokenizer, self.ids) if whole else self._text

    def next_logprobs(self) -> list[TokenLogprob]:
        """How likely the tokens were whose text was handed on since it was asked last; at the end, all that are left.

        A text that ends the answer takes its tokens along.
        """
        end = self._shown if self._cut or not self.stop else float("inf")
        new = list(itertools.takewhile(lambda one: one.begin < end, self._logprobs[self._told :]))
        self._told += len(new)
        return new

    def _place(self) -> None:
        self._logprobs += laid_out(self._unplaced, len(self._text))
        self._unplaced = []

    def _take(self, piece: str) -> None:
        start = max(0, len(self._text) - max(map(len, self._reasons), default=0))
        self._place()
        self._text += piece
        found = [(at, -len(end), end) for end in self._reasons if (at := self._text.find(end, start)) >= 0]
        if found:
            at, _, end = min(found)
            self._text, self.stop, self._cut = self._text[:at], self._reasons[end], True
        held = 0 if self.stop else self._beginning()
        self._show(len(self._text) - held)

    def _beginning(self) -> int:
        """How many of the last characters may be the beginning of a text that ends the answer."""
        longest = max((len(end) - 1 for end in self._reasons), default=0)
        for count in range(min(longest, len(self._text)), 0, -1):
            if any(end.startswith(self._text[-count:]) for end in self._reasons):
                return count
        return 0

    def _show(self, end: int) -> None:
        if self._on_text and end > self._shown:
            piece, self._shown = self._text[self._shown : end], end
            self._on_text(piece)


class AnswerCriteria:
    """Hands every new token to its row's answer, and says which rows are finished: a criterion of transformers'
    ``generate``, which calls it after each step.

    ``computed``: the tokens of a single row that went through the model, which the newest did not yet. ``likely``: how
    likely a token (the second) was in a row of the batch (the first).
    """

    def __init__(
        self, answers: Sequence[Answer], start: int, likely: Callable[[int, int], TokenLogprob | None]
    ) -> None:
        self._answers, self._seen, self._likely = answers, start, likely
        self._ids: Any = None  # (rows, tokens)

    @property
    def computed(self) -> list[int]:
        return [] if self._ids is None else self._ids[0, :-1].tolist()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        import torch

        self._ids = input_ids
        for number, row in enumerate(input_ids[:, self._seen :].tolist()):
            for token in row:
                self._answers[number].add(token, self._likely(number, token))
        self._seen = input_ids.shape[1]
        finished = [bool(answer.stop) or answer.is_left() for answer in self._answers]
        return torch.tensor(finished, device=input_ids.device)
