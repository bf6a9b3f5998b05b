"""An answer that comes token by token is the answer that all its tokens make at once."""

from __future__ import annotations

import functools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from stackctl.engine.generation.stopping import Answer, Endings, TokenText

tokenizer: Any = functools.cache(tiny_tokenizer)
tokens = st.lists(st.integers(0, 256), max_size=40) | st.text(max_size=20).map(
    lambda text: tokenizer()(text, add_special_tokens=False)["input_ids"]
)
END = 257


def decode(ids: list[int]) -> str:
    return str(tokenizer().decode(ids, skip_special_tokens=True))


@given(tokens)
def test_pieces_join_to_the_whole(ids: list[int]) -> None:
    """Any bytes, broken characters among them."""
    stream = TokenText(tokenizer())
    assert "".join([*(stream.add(token) for token in ids), stream.rest()]) == decode(ids)


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_is_never_shown_in_part(text: str, stops: list[str]) -> None:
    shown: list[str] = []
    answer = Answer(tokenizer(), Endings([END], stops), shown.append)
    wanted = text
    for end in range(len(text) + 1):  # the first text that is complete ends the answer, the earliest begun of several
        if found := [text.index(stop) for stop in stops if stop in text[:end]]:
            wanted = text[: min(found)]
            break
    for token in tokenizer()(text, add_special_tokens=False)["input_ids"]:
        answer.add(token)
        assert wanted.startswith("".join(shown)), "what is on the screen cannot be taken back"
    answer.finish()
    assert "".join(shown) == answer.text == wanted
    assert answer.stop == ("stop" if any(stop in text for stop in stops) else "length")


@given(tokens, st.lists(st.text("ab海", min_size=1, max_size=2), max_size=2))
def test_streamed_or_not_it_is_the_same_answer(ids: list[int], stops: list[str]) -> None:
    shown: list[str] = []
    streamed = Answer(tokenizer(), Endings([END], stops), shown.append)
    silent = Answer(tokenizer(), Endings([END], stops), None)
    for answer in (streamed, silent):
        for token in [*ids, END, 97]:
            answer.add(token)
        answer.finish()
    assert (streamed.text, streamed.stop, streamed.ids) == (silent.text, silent.stop, silent.ids)
    assert "".join(shown) == silent.text
    assert silent.stop in ("end", "stop")
