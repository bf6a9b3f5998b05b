"""Which words of an answer are not the first one's."""

from __future__ import annotations

import pytest

from stackctl.render.text_diff import compare_words


def marked(first: str, text: str) -> list[str]:
    found = compare_words(first, text)
    assert "".join(piece for piece, _ in found.pieces) == text
    return [piece for piece, differs in found.pieces if differs]


@pytest.mark.parametrize(
    ("first", "text", "expected"),
    [
        ("the sea is wide", "the sea is wide", []),
        ("the sea is wide", "the sea was very wide", ["was very"]),
        ("the sea is wide", "The sea, is wide!", ["The", ",", "!"]),
        ("the sea.", "the lake.", ["lake"]),
        ("well-known, isn't it", "well-kept, isn't it", ["well-kept"]),
        ("the  sea\nis wide", "the sea is wide", []),
        ("海是什么？", "海是水。", ["水。"]),
        ("a 海水 b", "a 海风 b", ["风"]),
        ("शब्द एक", "शब्द दो", ["दो"]),
        ("", "all of it", ["all of it"]),
        ("all of it", "", []),
        (" ", "\n", []),
    ],
)
def test_words_that_differ_are_marked(first: str, text: str, expected: list[str]) -> None:
    assert marked(first, text) == expected


def test_words_are_counted_without_their_punctuation() -> None:
    found = compare_words("One, two, three, four.", "One; two (2) four!")
    assert (found.words, found.differing, found.left_out) == (4, 1, 0)
    shorter = compare_words("one two three four", "one four")
    assert (shorter.words, shorter.differing, shorter.left_out, shorter.same) == (2, 0, 2, False)
    for first, text in (("one", "one."), ("one.", "one")):
        found = compare_words(first, text)
        assert (found.same, found.differing, found.left_out) == (False, 0, 0), (
            "punctuation counts, though it is no word"
        )
    assert compare_words("one two", "one  two\n").same is True


def test_frequent_words_of_long_texts_are_words_too() -> None:
    """The trap: difflib's autojunk drops what stands often in more than 200 words, and all of it would be marked."""
    text = " ".join(f"the {number} of" for number in range(150))
    assert marked(text, text.replace(" 75 ", " other ")) == ["other"]
