"""The bytes of an answer's tokens, joined, are its text; each token's place in it is where its bytes begin."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from stackctl.engine.generation.logprobs import TokenBytes, TokenLogprob
from stackctl.engine.generation.stopping import Answer, Endings


def sentencepiece() -> Any:
    """As Llama 2 has it: ▁ for a space, a token for every byte, no space at the beginning of a text."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcde", "▁a", "ab", "海", "<unk>"]
    raw = Tokenizer(
        models.BPE({name: i for i, name in enumerate(names)}, [("▁", "a"), ("a", "b")], byte_fallback=True,
                   unk_token="<unk>")
    )  # fmt: skip
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def wordpiece() -> Any:
    names = ["[UNK]", *"abcde", *(f"##{letter}" for letter in "abcde"), "ab", "##ba"]
    raw = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.WordPiece("##", cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=raw)


KINDS: dict[str, Any] = {
    kind.__name__: functools.cache(kind) for kind in (tiny_tokenizer, sentencepiece, wordpiece)
}  # fmt: skip
TEXTS = {
    "tiny_tokenizer": st.text(max_size=20),
    "sentencepiece": st.text("abc de海水é", max_size=20),
    "wordpiece": st.text("abc de", max_size=20),
}


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_bytes_of_tokens_join_to_the_text(kind: str, data: Any) -> None:
    tokenizer, text = KINDS[kind](), data.draw(TEXTS[kind])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spell = TokenBytes(tokenizer)
    joined = b"".join(spell(token, first=not place) for place, token in enumerate(ids)).decode()
    assert joined == tokenizer.decode(ids)
    answer = Answer(tokenizer, Endings(), lambda _: None)
    for token in ids:
        answer.add(token, TokenLogprob(spell(token, first=not answer.ids), 0.0))
    answer.finish()
    told = answer.next_logprobs()
    starts = [one.begin for one in told]
    assert len(told) == len(ids) and starts == sorted(starts)
    for number, one in enumerate(told):
        before = b"".join(other.content for other in told[:number])
        assert one.begin == len(before.decode(errors="ignore")), "a part of a character begins where the character does"


@given(st.lists(st.integers(0, 256), max_size=40))
@example([169, 94, 0])  # ED A1 21: the second byte cannot follow the first
def test_broken_characters_have_their_places(ids: list[int]) -> None:
    """Any bytes: the places are those of the characters that the text has."""
    tokenizer = KINDS["tiny_tokenizer"]()
    spell, seen = TokenBytes(tokenizer), list[TokenLogprob]()
    answer = Answer(tokenizer, Endings(), lambda _: seen.extend(answer.next_logprobs()))
    for token in ids:
        answer.add(token, spell.likely((token, -1.0), [], first=not answer.ids))
    answer.finish()
    told = [*seen, *answer.next_logprobs()]
    assert len(told) == len(ids)
    for one in told:
        if not one.is_special and one.content[0] < 128:
            assert answer.text[one.begin] == one.content.decode()
