"""Guessed tokens that one pass checks: fewer passes, and the text, the draws and the cache of one token at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stackctl.core.errors import Incompatible
from stackctl.engine.generation import PrefixCache, Sampling, generate, generate_reply
from stackctl.engine.generation.drafts import Drafts
from stackctl.engine.generation.plain_decoder import PlainDecoder, plain_decoder
from stackctl.engine.models import StackedModel
from stackctl.engine.records.prompt_files import Prompt

PROMPT = Prompt("one two three, one two three, one two")
LENGTH = 100
COSTS = {1: 0.10, 2: 0.16, 7: 0.62, 15: 1.07}


class Passes:
    """How many tokens of a row went through the model in each step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        step = PlainDecoder.step

        def counted(decoder: Any, tokens: Any, rows: Any) -> Any:
            self.tokens.append(rows.tokens)
            return step(decoder, tokens, rows)

        patch.setattr(PlainDecoder, "step", counted)

    def __len__(self) -> int:
        return len(self.tokens)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    return Passes(monkeypatch)


@pytest.fixture
def stacked(h: Any) -> StackedModel:
    """A tiny model with a stack folded."""
    h.add("style", seed=1)
    loaded: StackedModel = h.load()
    loaded.use(h.plan("style"))
    return loaded


class Oracle:
    """Guesses from the answer itself, some of them wrong: every way of being right and wrong, often."""

    def __init__(self, patch: pytest.MonkeyPatch, answer: Any) -> None:
        self._draws = torch.Generator().manual_seed(0)

        def guess(drafts: Any, most: int) -> list[int]:
            made = len(drafts._ids) - len(answer.asked)
            count = int(torch.randint(0, 8, (1,), generator=self._draws))
            right = int(torch.randint(0, count + 1, (1,), generator=self._draws))
            found = [*answer.ids[made : made + right], *[7] * count][:count]
            return found[: max(most, 0)]

        patch.setattr(Drafts, "guess", guess)


def alone(stacked: StackedModel, sampling: Sampling, **options: Any) -> Any:
    return next(generate(stacked, [PROMPT], sampling, **options))


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Answers one token at a time."""

    def answer(stacked: StackedModel, sampling: Sampling, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Drafts, "guess", lambda drafts, most: [])
            return alone(stacked, sampling, **options)

    return answer


def test_guesses_are_what_followed_and_go_round_with_a_text_that_does() -> None:
    drafts = Drafts([1, 2, 3, 4, 9, 1, 2], COSTS)
    assert drafts.guess(3) == [3], "one at first"
    drafts.checked(1, [3, 4])
    assert drafts.guess(9) == [9, 1]
    drafts.checked(2, [9, 1, 2])
    assert drafts.guess(9) == [3, 4, 9, 1, 2, 3, 4]
    assert drafts.guess(4) == [3, 4, 9, 1]
    assert drafts.guess(0) == drafts.guess(-1) == []
    drafts.checked(7, [5])
    assert drafts.guess(9) == [], "5 is new"


@pytest.mark.parametrize("costs", [COSTS, {1: 0.25, 2: 0.45, 7: 1.1}])
@pytest.mark.parametrize("length", [30, 300, 3000])
def test_guesses_that_are_never_right_cost_little(length: int, costs: dict[int, float]) -> None:
    drafts = Drafts([1, 2, 1], costs)
    spent = 0.0
    for token in range(length):
        guesses = drafts.guess(length - token)
        spent += costs[len(guesses)] if guesses else 0
        drafts.checked(len(guesses), [1000 + token if token % 2 else 1])  # after 1 always something new
    assert 0 < spent <= 0.3 + 0.02 * length


def test_half_precision_takes_one_token_at_a_time(h: Any, passes: Passes) -> None:
    loaded = h.load(dtype="bfloat16")
    alone(loaded, Sampling(max_new_tokens=LENGTH, raw=True))
    assert set(passes.tokens) == {1}


@torch.no_grad()
def test_logits_behind_guesses_are_those_of_a_whole_pass_in_float64(stacked: StackedModel) -> None:
    """Several tokens for each of several rows of unlike length, some of them kept and some cut off."""
    exact = copy.deepcopy(stacked.model).double()
    decoder = plain_decoder(stacked)
    assert decoder is not None
    draws = torch.Generator().manual_seed(0)
    for texts in ([[5, 9, 14, 3]], [[5, 9, 14], [11, 4, 8]], [[5, 9, 14, 3, 8, 21, 30], [11, 4], [17, 23, 6, 12]]):
        rows = decoder.rows(len(texts))
        rows.join(texts)
        for step in range(60):
            count = 1 + step % 7
            new = torch.randint(0, 256, (len(texts), count), generator=draws).tolist()
            found = rows.step(new)
            for number, (text, tokens) in enumerate(zip(texts, new, strict=True)):
                whole = exact(input_ids=torch.tensor([[*text, *tokens]]), use_cache=False).logits[0, -count:]
                torch.testing.assert_close(found[number].double(), whole, rtol=1e-4, atol=1e-5)
                kept = int(torch.randint(0, count, (1,), generator=draws)) if step % 3 else count - 1
                for _ in range(kept):
                    rows.keep(number)
                text += tokens[: 1 + kept]


SAMPLINGS = [
    Sampling(max_new_tokens=LENGTH, raw=True),
    Sampling(max_new_tokens=LENGTH, raw=True, repetition_penalty=1.3),
    Sampling(max_new_tokens=LENGTH, raw=True, temperature=1.0, seed=3, top_logprobs=2),
    Sampling(max_new_tokens=LENGTH, raw=True, temperature=0.7, top_k=20, top_p=0.9, min_p=0.01, seed=4),
]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_right_and_wrong_guesses_change_no_token(
    stacked: StackedModel, without: Any, passes: Passes, monkeypatch: pytest.MonkeyPatch, sampling: Sampling
) -> None:
    wanted = without(stacked, sampling)
    plain = len(passes)
    assert plain == wanted.new_tokens - (wanted.stop == "length")
    Oracle(monkeypatch, wanted)
    found = alone(stacked, sampling)
    assert (found.ids, found.text, found.stop) == (wanted.ids, wanted.text, wanted.stop)
    assert len(passes) - plain < 0.7 * plain
    streamed: list[str] = []
    again = alone(stacked, sampling, on_text=streamed.append)
    assert again.ids == wanted.ids
    assert "".join(streamed) == wanted.text


@pytest.mark.parametrize("limit", range(1, 9))
def test_no_token_beyond_the_limit(stacked: StackedModel, passes: Passes, limit: int) -> None:
    long = alone(stacked, Sampling(max_new_tokens=LENGTH, raw=True))
    passes.tokens.clear()
    short = alone(stacked, Sampling(max_new_tokens=limit, raw=True))
    assert (short.ids, short.stop) == (long.ids[:limit], "length")
    assert sum(passes.tokens) <= limit + 7


def test_a_stop_within_right_guesses_ends_the_answer(
    stacked: StackedModel, without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = without(stacked, Sampling(max_new_tokens=LENGTH, raw=True))
    for at in range(4, len(long.text) - 4, 5):
        sampling = Sampling(max_new_tokens=LENGTH, raw=True, stop=(long.text[at : at + 3],))
        wanted = without(stacked, sampling)
        with monkeypatch.context() as patch:
            Oracle(patch, long)
            found = alone(stacked, sampling)
        assert (found.ids, found.text, found.stop) == (wanted.ids, wanted.text, "stop")


def test_what_is_remembered_has_no_wrong_guess(
    stacked: StackedModel, without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where whoever listens breaks off in the middle of what one pass gave."""
    sampling = Sampling(max_new_tokens=24, raw=True)
    wanted = without(stacked, sampling)
    for heard in range(1, 12):
        remembered = PrefixCache()
        pieces = iter(range(heard))

        def listen(_: str, pieces: Iterator[int] = pieces) -> None:
            if next(pieces, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            Oracle(patch, wanted)
            with pytest.raises(KeyboardInterrupt):
                generate_reply(stacked, PROMPT, sampling, listen, remembered)
        known = Prompt(PROMPT.text + wanted.text[: heard + 2])
        found = generate_reply(stacked, known, sampling, lambda _: None, remembered)
        fresh = generate_reply(stacked, known, sampling, lambda _: None)
        assert found.ids == fresh.ids


def test_logits_that_are_no_numbers_are_refused_where_they_are_needed(
    stacked: StackedModel, without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(max_new_tokens=12, raw=True)
    wanted = without(stacked, sampling)
    step = PlainDecoder.step

    def broken(needed: bool) -> Any:
        def spoil(decoder: Any, tokens: Any, rows: Any) -> Any:
            logits = step(decoder, tokens, rows)
            if rows.tokens > 1:
                logits[1 if needed else -1] = float("nan")
            return logits

        return spoil

    def guess(drafts: Any, most: int) -> list[int]:
        return [*wanted.ids[1:2], 7, 7] if len(drafts._ids) == len(wanted.asked) + 1 else []

    monkeypatch.setattr(Drafts, "guess", guess)
    monkeypatch.setattr(PlainDecoder, "step", broken(needed=False))
    assert alone(stacked, sampling).ids == wanted.ids
    monkeypatch.setattr(PlainDecoder, "step", broken(needed=True))
    with pytest.raises(Incompatible, match="not a finite number"):
        alone(stacked, sampling)
