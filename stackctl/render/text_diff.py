"""Where one text's words differ from another's. Pure: texts to pieces.

A word is what stands between spaces, without the punctuation at it; of Chinese and Japanese, which put no spaces
between words, each character.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import SequenceMatcher

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_PUNCTUATION = '.,;:!?…"“”„«»()[]{}*_、。，！？；：「」『』（）—–'
_MARK = re.escape(_PUNCTUATION)
_WORD = re.compile(rf"[{_ALONE}]|[{_MARK}]|[^\s{_ALONE}{_MARK}]+")


@dataclass(frozen=True)
class Difference:
    """A text beside the first one. ``pieces`` are (text, differs) and joined are the text, character by character."""

    pieces: tuple[tuple[str, bool], ...]
    words: int
    differing: int
    left_out: int
    same: bool


def compare_words(first: str, text: str) -> Difference:
    """What is in ``text`` and not, at that place, in ``first``.

    ``words`` counts those of ``text``, ``differing`` those of them that are marked, ``left_out`` the words of ``first``
    that have nothing in their place. Differing words in a row are one piece, with the space between them. ``same`` is
    word for word and mark for mark, whatever the space between them.
    """
    before, found = _WORD.findall(first), list(_WORD.finditer(text))
    after = [word.group() for word in found]
    pieces: list[tuple[str, bool]] = []
    done = differing = left_out = 0
    # autojunk would take a long text's frequent words for noise and mark what is the same
    for kind, a_start, a_end, start, end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "delete":
            left_out += _count(before[a_start:a_end])
        elif kind != "equal":
            begin, stop = found[start].start(), found[end - 1].end()
            pieces += [(text[done:begin], False), (text[begin:stop], True)]
            differing += _count(after[start:end])
            done = stop
    pieces.append((text[done:], False))
    shown = tuple(piece for piece in pieces if piece[0])
    return Difference(shown, _count(after), differing, left_out, before == after)


def _count(words: list[str]) -> int:
    return sum(word not in _PUNCTUATION for word in words)
