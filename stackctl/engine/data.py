"""Records to token ids and labels, rows of documents, and batches without padding.

What is supervised is decided on characters, never by comparing ids: SmolLM2's pad token *is* its end-of-turn token,
and a user may type ``<|im_end|>``. A conversation is laid out as the chat template renders it, in as few texts as
the template allows, and in each text the spans are marked that the assistant said.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from stackctl.engine.records import ChatRecord, CompletionRecord, Message, Record, RecordSet, TextRecord
from stackctl.errors import Usage

IGNORED = -100
"""The label of a token that nothing is learned from; torch's own."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What a base without a chat template gets."""

_SENTINEL = "Sentinel7f3a9c"
_SENTINEL_TURN = {"role": "assistant", "content": _SENTINEL}
_TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_BATCH = 512
"""Records tokenised in one call: enough for the tokenizer's threads, few enough for the memory that offsets take."""
_SHOWN = 5


@dataclass(slots=True)
class Example:
    """One sequence. ``labels`` are as long as ``input_ids`` and not shifted; -100 where nothing is learned.

    The first label is always -100: nothing stands before it that could predict it.
    """

    input_ids: list[int]
    labels: list[int]


@dataclass
class Encoded:
    """What became of the records.

    ``truncated`` counts the records that ``max_length`` cut; ``unsupervised`` holds the numbers of those of which
    nothing to learn was left, and which are dropped. ``supervised_tokens`` are those that contribute to a loss.
    """

    examples: list[Example]
    truncated: int = 0
    unsupervised: list[int] = field(default_factory=list)
    tokens: int = 0
    supervised_tokens: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Layout:
    """A text before it is tokenised: the spans (start, end) of characters to learn, in order.

    ``document``: the tokenizer's own special tokens stand before it. ``ends``: an EOS token is learned after it.
    """

    text: str
    spans: list[tuple[int, int]]
    document: bool = False
    ends: bool = False

    @property
    def whole(self) -> bool:
        """Everything is learned."""
        return self.spans == [(0, len(self.text))]


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template ChatML; True when it had none.

    Where the tokenizer puts a BOS before a text, ChatML gets it as well: some bases are lost without one.
    """
    if tokenizer.chat_template:
        return False
    begins = bool(prefix_ids(tokenizer)) and tokenizer.bos_token is not None
    tokenizer.chat_template = "{{ bos_token }}" + CHATML if begins else CHATML
    return True


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text of its own accord; those it puts after are not wanted."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def end_of_turn(tokenizer: Any) -> str:
    """The text that ends an assistant's turn, to stop at; empty when the template has none and EOS ends a turn."""
    return _Turns(tokenizer).end.rstrip()


class _Turns:
    """How a tokenizer's chat template marks the assistant's turns, found by rendering a sentinel.

    ``lead`` is what stands between the generation prompt and the content (Llama 2: a space; Qwen3: an empty
    ``<think>`` block), ``end`` what follows the content, with the white space after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise Usage(
                "the tokenizer has no chat template, which conversations need",
                hint="use a base with a chat template, or records of {'text'} or {'prompt', 'completion'}",
            )
        user = {"role": "user", "content": "Hello"}
        try:
            before, found, self.end = self.render([user, _SENTINEL_TURN]).partition(_SENTINEL)
            prompt = self.render([user], prompt=True)
        except _TEMPLATE_ERRORS as error:
            raise Usage(f"the chat template fails on a user and an assistant turn ({_reason(error)})") from None
        if not found:
            raise Usage("the chat template does not render what the assistant says")
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""

    def render(self, messages: list[Message], *, prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def turn(self, messages: list[Message], position: int) -> tuple[str, int, int, bool]:
        """The text up to the end of one assistant turn, the span of that turn, and whether a prompt leads to it.

        The span begins where generation would, after the generation prompt of what comes before. Where the template
        renders the finished turn after something else than that prompt (Mistral's puts a system message only into
        the *last* user turn), the turn is put behind the prompt: that is what generation will see.
        """
        through = self.render(messages[: position + 1])
        end = len(through) - (len(self.end) - len(self.end.rstrip()) if through.endswith(self.end) else 0)
        try:
            prompt = self.render(messages[:position], prompt=True) if position else None
        except _TEMPLATE_ERRORS:
            prompt = None  # some templates cannot render what has no user turn yet
        if prompt is not None and through.startswith(prompt):
            return through, len(prompt), end, True
        before = self.render([*messages[:position], _SENTINEL_TURN]).partition(_SENTINEL)[0].removesuffix(self.lead)
        if not through.startswith(before):
            raise ValueError(f"it does not show where message {position + 1} begins")
        if prompt is None:
            return through, len(before), end, True
        return prompt + through[len(before) :], len(prompt), end - len(before) + len(prompt), False

    def layouts(self, record: ChatRecord) -> tuple[list[_Layout], bool]:
        """Every assistant turn in as few texts as possible, and whether every turn follows its own prompt.

        One text holds them all when the template renders a turn the same whether or not others follow. Qwen3's does
        not (it takes ``<think>`` out of earlier turns): then a turn has a text of its own, that of inference.
        """
        layouts: list[_Layout] = []
        regular = True
        for position in reversed(range(record.context, len(record.messages))):
            if record.messages[position]["role"] != "assistant":
                continue
            text, start, end, led = self.turn(record.messages, position)
            regular = regular and led
            for layout in layouts:
                if end <= layout.spans[0][0] and layout.text.startswith(text[:end]):
                    layout.spans.insert(0, (start, end))
                    break
            else:
                layouts.append(_Layout(text, [(start, end)], ends=not self.end.strip()))
        for layout in layouts:
            if layout.ends:
                layout.text = layout.text[: layout.spans[-1][1]]
        return layouts[::-1], regular


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def encode(records: RecordSet, tokenizer: Any, *, max_length: int, split_long: bool = False) -> Encoded:
    """Token ids and labels of all records, in their order.

    * text: every token is supervised, and an EOS after it, so that the model learns where a document ends;
    * prompt and completion: the completion and an EOS after it;
    * conversations: every assistant turn with its end-of-turn token, and nothing else. What follows the last of them
      is left out, since it changes no loss.

    What is longer than ``max_length`` is cut; with ``split_long`` texts are split instead, each piece beginning with
    the last token of the one before it, so that every token is still learned once.

    Raises:
        Usage: the chat template refuses a conversation, or nothing is left to learn.
    """
    encoded = Encoded([])
    laid_out = _lay_out(records, tokenizer, encoded)
    tokenise = _Tokenise(tokenizer)
    for batch in _batched(laid_out, _BATCH):
        examples = tokenise([layout for _, layouts in batch for layout in layouts])
        for record, layouts in batch:
            kept: list[Example] = []
            cut = False
            for _, example in zip(layouts, examples, strict=False):
                if split_long and isinstance(record, TextRecord):
                    kept += _split(example, max_length)
                else:
                    needed = _cut(example, len(example.input_ids))
                    cut = cut or len(needed.input_ids) > max_length
                    kept.append(_cut(needed, max_length))
            kept = [example for example in kept if example.input_ids]
            encoded.examples += kept
            encoded.truncated += cut
            if not kept:
                encoded.unsupervised.append(record.number)
    if not encoded.examples:
        raise Usage(
            f"no record of {records.path} has anything to learn within {max_length} tokens", hint="raise --max-length"
        )
    encoded.tokens = sum(len(example.input_ids) for example in encoded.examples)
    encoded.supervised_tokens = sum(len(example.labels) - example.labels.count(IGNORED) for example in encoded.examples)
    return encoded


def _lay_out(records: RecordSet, tokenizer: Any, encoded: Encoded) -> list[tuple[Record, list[_Layout]]]:
    """The texts of every record, and into ``encoded.notes`` what is unusual about them."""
    turns: _Turns | None = None
    laid_out: list[tuple[Record, list[_Layout]]] = []
    problems: list[str] = []
    several = irregular = 0
    for record in records.records:
        if isinstance(record, TextRecord):
            layouts = [_Layout(record.text, [(0, len(record.text))], document=True, ends=True)]
        elif isinstance(record, CompletionRecord):
            text = record.prompt + record.completion
            layouts = [_Layout(text, [(len(record.prompt), len(text))], document=True, ends=True)]
        else:
            turns = turns or _Turns(tokenizer)
            try:
                layouts, regular = turns.layouts(record)
            except _TEMPLATE_ERRORS as error:
                problems.append(f"{records.place(record.number)}: {_reason(error)}")
                continue
            several += len(layouts) > 1
            irregular += not regular
        laid_out.append((record, layouts))
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise Usage(
            f"{records.path}: the base's chat template refuses {'; '.join(problems[:_SHOWN])}{more}",
            hint="change these conversations to what the template takes, or use another base",
        )
    if several:
        encoded.notes.append(
            f"the chat template renders earlier assistant turns differently: {several} of {records.count} "
            "conversations became one example per turn"
        )
    if irregular:
        encoded.notes.append(
            f"the chat template renders a finished turn after something else than its generation prompt: "
            f"{irregular} of {records.count} conversations were laid out after the prompt"
        )
    return laid_out


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


class _Tokenise:
    """Layouts to examples with one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._prefix = prefix_ids(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        # SentencePiece puts a space before whatever it is given; byte-level BPE can be given a text in pieces.
        parts = tokenizer(["x:", "y z"], add_special_tokens=False)["input_ids"]
        self._splits = tokenizer.decode([*parts[0], *parts[1]], clean_up_tokenization_spaces=False) == "x:y z"

    def __call__(self, layouts: Sequence[_Layout]) -> Iterator[Example]:
        """One example for each layout, uncut.

        A text is tokenised in pieces that begin where a span begins, because that is what generation does: it gets
        the prompt's tokens and goes on from there. "assistant⏎" and "⏎⏎Yes" are never joined in one token.
        """
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
            ids: list[int] = list(self._prefix) if layout.document else []
            labels = [IGNORED] * len(ids)
            for (start, _), (piece_ids, offsets) in zip(bounds, tokens, strict=False):
                ids += piece_ids
                labels += _labels(layout, piece_ids, _coverage(offsets, start))
            if layout.ends and self._eos is not None and ids[-1:] != [self._eos]:
                ids.append(self._eos)
                labels.append(self._eos)
            labels[:1] = [IGNORED] * len(labels[:1])
            yield Example(ids, labels)

    def _pieces(self, layout: _Layout) -> list[tuple[int, int]]:
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


def _labels(layout: _Layout, ids: list[int], coverage: Iterable[tuple[int, int]]) -> list[int]:
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


def _cut(example: Example, max_length: int) -> Example:
    """At most ``max_length`` tokens, ending with a supervised one; empty when there is none."""
    ids, labels = example.input_ids[:max_length], example.labels[:max_length]
    length = len(labels)
    while length and labels[length - 1] == IGNORED:
        length -= 1
    return Example(ids[:length], labels[:length])


def _split(example: Example, max_length: int) -> list[Example]:
    """Pieces of at most ``max_length`` tokens; each begins with the last token of the one before it, for context."""
    pieces = []
    for start in range(0, len(example.input_ids) - 1, max_length - 1):
        labels = example.labels[start : start + max_length]
        labels[0] = IGNORED
        pieces.append(Example(example.input_ids[start : start + max_length], labels))
    return pieces


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows of at most ``max_length`` tokens, filled by best fit, the longest examples first.

    Examples stay whole and apart (:func:`collate` keeps attention inside each). Deterministic: rows are ordered by
    their first example, and the examples in a row stand in the order in which they came.

    Raises:
        ValueError: an example is longer than a row; ``encode(..., split_long=True)`` makes none.
    """
    order = sorted(range(len(examples)), key=lambda index: (-len(examples[index].input_ids), index))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, row), sorted
    for index in order:
        length = len(examples[index].input_ids)
        if length > max_length:
            raise ValueError(f"an example of {length} tokens does not fit into a row of {max_length}")
        place = bisect.bisect_left(room, (length, -1))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(index)
        else:
            left, row = max_length, len(rows)
            rows.append([index])
        bisect.insort(room, (left - length, row))
    return [[examples[index] for index in row] for row in sorted(map(sorted, rows))]


def collate(rows: Sequence[Example]) -> dict[str, Tensor]:
    """One micro-batch laid out in a single row, T tokens, without padding.

    Returns ``input_ids`` (1, T); ``position_ids`` (1, T), restarting at 0 for each example; ``keep`` (K,), the
    positions whose logits are needed, each the one before a supervised token of the same example; ``labels`` (K,),
    the tokens to predict there.

    transformers keeps the examples apart by their restarting positions only when the model gets neither an attention
    mask nor a cache, and it makes a cache unless told not to: without ``use_cache=False`` they see one another.
    """
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    labels: list[int] = []
    for example in rows:
        before = len(ids) - 1
        for position, label in enumerate(example.labels):
            if position and label != IGNORED:
                keep.append(before + position)
                labels.append(label)
        ids += example.input_ids
        positions += range(len(example.input_ids))
    return {
        "input_ids": torch.tensor([ids], dtype=torch.int64),
        "position_ids": torch.tensor([positions], dtype=torch.int64),
        "keep": torch.tensor(keep, dtype=torch.int64),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
