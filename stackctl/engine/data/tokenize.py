"""Texts with spans to token ids and labels.

What is supervised is decided on characters, never by comparing ids: SmolLM2's pad token *is* its end-of-turn token,
and a user may type ``<|im_end|>``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from stackctl.engine.data.chat_template import prefix_ids
from stackctl.engine.data.examples import IGNORED, Example, Layout


class Tokenise:
    """Layouts to examples with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix = prefix_ids(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        # SentencePiece puts a space before whatever it is given; byte-level BPE can be given a text in pieces.
        parts = tokenizer(["x:", "y z"], add_special_tokens=False)["input_ids"]
        self._splits = tokenizer.decode([*parts[0], *parts[1]], clean_up_tokenization_spaces=False) == "x:y z"

    def __call__(self, layouts: Sequence[Layout]) -> Iterator[Example]:
        """One example for each layout, uncut.

        A text is tokenised in pieces that begin where a span begins, because that is what generation does: it gets
        the prompt's tokens and goes on from there. "assistant⏎" and "⏎⏎Yes" are never joined in one token.
        """
        if not layouts:  # the tokenizer takes no empty list
            return
        pieces = [self._pieces(layout) for layout in layouts]
        flat = [layout.text[a:b] for layout, bounds in zip(layouts, pieces, strict=True) for a, b in bounds]
        encoding = self._tokenizer(
            flat,
            add_special_tokens=False,
            return_offsets_mapping=not all(layout.whole for layout in layouts),
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        tokens = zip(encoding["input_ids"], encoding.get("offset_mapping") or itertools.repeat([]), strict=False)
        for layout, bounds in zip(layouts, pieces, strict=True):
            ids: list[int] = []
            labels: list[int] = []
            for (start, _), (piece_ids, offsets) in zip(bounds, tokens, strict=False):
                ids += piece_ids
                labels += _labels(layout, piece_ids, _coverage(offsets, start))
            if layout.document and self._prefix:
                own = ids[: len(self._prefix)] == self._prefix  # the text begins with it already
                ids[: len(self._prefix) if own else 0] = self._prefix
                labels[: len(self._prefix) if own else 0] = [IGNORED] * len(self._prefix)
            if layout.ends and self._eos is not None and ids[-1:] != [self._eos]:
                ids.append(self._eos)
                labels.append(self._eos)
            labels[:1] = [IGNORED] * len(labels[:1])
            yield Example(ids, labels)

    def _pieces(self, layout: Layout) -> list[tuple[int, int]]:
        starts = [start for start, _ in layout.spans] if self._splits else []
        return [(a, b) for a, b in itertools.pairwise([0, *starts, len(layout.text)]) if a < b]


def _coverage(offsets: Sequence[tuple[int, int]], start: int) -> Iterator[tuple[int, int]]:
    """The characters (start, end) that each token stands for.

    Offsets alone are not enough: some tokenizers trim spaces from them, down to zero width. Tokens follow one another,
    so a token covers everything from the end of the one before it; where several share one character (emoji, Chinese
    in byte-level BPE) each covers it.
    """
    reached = start
    for token_start, token_end in offsets:
        token_start, token_end = token_start + start, token_end + start
        yield min(token_start, reached), token_end
        reached = max(reached, token_end)


def _labels(layout: Layout, ids: list[int], coverage: Iterable[tuple[int, int]]) -> list[int]:
    """The ids of the tokens inside a span, -100 for the others.

    A token may reach over an edge with white space only, as ``<|end|>⏎`` does where a tokenizer makes it one token.
    """
    if layout.whole:
        return list(ids)
    text, spans = layout.text, layout.spans
    labels = []
    current = 0
    for token, (a, b) in zip(ids, coverage, strict=True):
        while current < len(spans) and spans[current][1] <= a:
            current += 1
        start, end = spans[current] if current < len(spans) else (len(text), len(text))
        overlaps = max(a, start) < min(b, end) or (a == b and start <= a < end)
        inside = overlaps and not text[a:start].strip() and not text[end:b].strip()
        labels.append(token if inside else IGNORED)
    return labels
