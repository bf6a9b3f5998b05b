"""The shapes in which records are written: recognised, checked, and turned into one of the four kinds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from stackctl.engine.records.messages import ParsedMessages, kind_of, template_arguments, text_of, tools_of, turns_of
from stackctl.engine.records.types import (
    BadRecord,
    ChatRecord,
    CompletionRecord,
    Format,
    Message,
    PreferenceRecord,
    Record,
    TextRecord,
)

_AROUND = ("system", "system_prompt", "history", "tools", "functions", "chat_template_kwargs", "enable_thinking")
"""What may stand beside the turns of any conversation."""
BELOW = ("input", "context")
"""What stands below an instruction: Alpaca calls it the input, Dolly the context."""
_ELSEWHERE = (
    "chosen", "rejected", "label", "kto_tag", "images", "image", "videos", "audios", "documents", "weight", "train",
    "loss", "loss_weight", "mask_history", "parallel_tool_calls", "tool_choice", "response_format", *BELOW,
    "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
"""Keys of a record that mean something to peers and nothing here, unless its shape reads them."""
_OF_TURNS = (
    "name", "prefix", "partial", "refusal", "audio", "audios", "images", "image", "videos", "mask", "loss_mask",
    "train_detail", "training_detail",
)  # fmt: skip
"""The same of a turn; of a tool's the name is read."""
_LISTED = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")

LABELS = ("label", "kto_tag")
"""Where a record says whether its answer is desired or to be avoided: TRL's name, and LLaMA-Factory's."""
_PROMPTS = ("prompt", "question", "conversations", "messages")
"""Where the prompt of two answers stands, if it stands beside them."""
_EQUAL = "its 'chosen' and 'rejected' are equal: there is nothing to prefer"


class RecordShape(NamedTuple):
    """One shape: the keys that it is known by, those that it also reads, and what makes a record of it."""

    format: Format
    keys: tuple[str, ...]
    parse: Callable[[int, dict[str, Any]], Record]
    also: tuple[str, ...] = ()


def _text(number: int, record: dict[str, Any]) -> Record:
    return TextRecord(number, text_of(record["text"], "'text'"))


def _listed(key: str) -> Callable[[int, dict[str, Any]], Record]:
    return lambda number, record: _chat(number, record, turns_of(record[key], f"'{key}'"))


def _completion(number: int, record: dict[str, Any]) -> Record:
    """Two texts, joined as they stand, or two lists of messages, of which the first is context."""
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        context = turns_of(prompt, "'prompt'")
        said = turns_of(completion, "'completion'", len(context.messages) + 1)
        start = len(context.messages)
        both = ParsedMessages(context.messages + said.messages, {start + position for position in said.muted})
        return _chat(number, record, both, start)
    return CompletionRecord(number, text_of(prompt, "'prompt'"), text_of(completion, "'completion'"))


def _asked(question: str, answer: str) -> Callable[[int, dict[str, Any]], Record]:
    """Two texts that are a question and its answer: a conversation of two turns."""

    def parse(number: int, record: dict[str, Any]) -> Record:
        user = asked_text(record, question)
        said = _pair(user, text_of(record[answer], f"'{answer}'"))
        return _chat(number, record, ParsedMessages(said))

    return parse


def _preference(number: int, record: dict[str, Any]) -> Record:
    """Two texts behind a prompt's, joined as they stand; or two conversations that share a beginning."""
    prompt = next((record[key] for key in _PROMPTS if record.get(key) is not None), None)
    answers = {key: record[key] for key in ("chosen", "rejected")}
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
        asked = text_of(prompt, "'prompt'")
        one, other = (CompletionRecord(number, asked, text_of(answers[key], f"'{key}'")) for key in answers)
        if one == other:
            raise BadRecord(_EQUAL)
        return PreferenceRecord(number, one, other)
    before = turns_of(prompt, "the prompt").messages if isinstance(prompt, list) else []
    if isinstance(prompt, str):
        before = [{"role": "user", "content": text_of(prompt, "'prompt'")}]
    said = {key: _conversation(before, answer, f"'{key}'") for key, answer in answers.items()}
    first, second = said["chosen"].messages, said["rejected"].messages
    if first == second:
        raise BadRecord(_EQUAL)
    same = (a == b for a, b in zip(first, second, strict=False))
    shared = sum(1 for _ in itertools.takewhile(bool, same))
    if not shared:
        raise BadRecord("has no prompt: 'chosen' and 'rejected' share no beginning, and no 'prompt' stands beside them")
    for key, turns in said.items():
        later = range(shared, len(turns.messages))
        if not any(turns.messages[n]["role"] == "assistant" and n not in turns.muted for n in later):
            raise BadRecord(f"its '{key}' has no assistant turn of its own behind what both share")
    chosen, rejected = (_chat(number, record, turns, shared) for turns in said.values())
    return PreferenceRecord(number, chosen, rejected)


def _conversation(before: list[Message], answer: Any, what: str) -> ParsedMessages:
    """A whole conversation; an answer, which begins with the assistant, is put behind what was said before."""
    if isinstance(answer, str) and not answer.lstrip().startswith("["):
        turns = ParsedMessages([{"role": "assistant", "content": text_of(answer, what)}])
    else:
        turns = turns_of([answer] if isinstance(answer, dict) else answer, what)
    if turns.messages and turns.messages[0]["role"] != "assistant":
        return turns
    return ParsedMessages(before + turns.messages, {len(before) + position for position in turns.muted})


SHAPES = (
    # Sets of preferences carry a "prompt", "messages" or "conversations" beside the two answers.
    RecordShape("preference", ("chosen", "rejected"), _preference, _PROMPTS),
    # The more specific come first: published Alpaca files carry a "text" as well, UltraChat a "prompt".
    RecordShape("messages", ("messages",), _listed("messages")),
    RecordShape("conversations", ("conversations",), _listed("conversations")),
    RecordShape("conversation", ("conversation",), _listed("conversation")),
    RecordShape("prompt", ("prompt", "completion"), _completion),
    RecordShape("instruction", ("instruction", "output"), _asked("instruction", "output"), BELOW),
    RecordShape("instruction", ("instruction", "response"), _asked("instruction", "response"), BELOW),
    RecordShape("response", ("prompt", "response"), _asked("prompt", "response")),
    RecordShape("question", ("question", "answer"), _asked("question", "answer")),
    RecordShape("question", ("question", "response"), _asked("question", "response")),
    RecordShape("query", ("query", "response"), _asked("query", "response")),
    RecordShape("text", ("text",), _text),
)
COLUMNS = {*_AROUND, *_ELSEWHERE, *(key for shape in SHAPES for key in (*shape.keys, *shape.also))}
SHAPE_HINT = (
    'a record is {"text"}, {"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, '
    '{"prompt", "completion"}, {"instruction", "input", "output"}, {"prompt", "response"}, {"question", "answer"} or '
    '{"prompt", "chosen", "rejected"}; for kto the first ones with a "label", true or false'
)


def shape_of(record: dict[str, Any]) -> RecordShape | None:
    """The first shape whose keys all have values; else the first whose keys are all there."""
    for present in ({key for key, value in record.items() if value is not None}, set(record)):
        for shape in SHAPES:
            if present.issuperset(shape.keys):
                return shape
    return None


def is_of_a_shape(keys: Iterable[str]) -> bool:
    """Whether records with these keys are of a known shape."""
    return shape_of(dict.fromkeys(keys, "")) is not None


def checked_shape(record: Any) -> RecordShape:
    if not isinstance(record, dict):
        raise BadRecord(f"{kind_of(record)}, not an object")
    if not (shape := shape_of(record)):
        keys = ", ".join(f"'{key}'" for key in list(record)[:6]) or "nothing"
        raise BadRecord(f"of no known shape (it has {keys})")
    return shape


def parse(number: int, value: Any, shape: RecordShape, *, labelled: bool = False) -> tuple[Record | None, list[str]]:
    """A record of a known shape, or None where it says itself that it is not to be learned; and its keys that mean
    nothing here. ``labelled``: its label, true or false, is read as what is desired of it.

    Raises:
        BadRecord: something in it is wrong.
    """
    record = shape.parse(number, value)
    if labelled and isinstance(record, CompletionRecord | ChatRecord):
        record = replace(record, desired=_label(value))
    kind = record.chosen if isinstance(record, PreferenceRecord) else record
    unread = _ELSEWHERE if isinstance(kind, ChatRecord) else (*_ELSEWHERE, *_AROUND)
    ignored = [
        key for key in unread if value.get(key) not in (None, "", [], {}) and key not in (*shape.keys, *shape.also)
    ]
    ignored += sorted({f"{key}[].{name}" for key in _LISTED for name in _unread_of_turns(value.get(key))})
    if labelled or isinstance(record, TextRecord):
        return record, [key for key in ignored if not labelled or key not in LABELS]
    ignored = [key for key in ignored if key not in LABELS or not isinstance(value[key], bool)]
    if any(value.get(key) is False for key in LABELS):  # what KTO learns to avoid
        return None, ignored
    return record, ignored


def _unread_of_turns(turns: Any) -> Iterator[str]:
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict):
            of_a_tool = turn.get("role") in ("tool", "function", "ipython")
            yield from (name for name in _OF_TURNS if turn.get(name) and not (of_a_tool and name == "name"))


def _label(record: dict[str, Any]) -> bool:
    """Whether an answer is desired, as the record says.

    Raises:
        BadRecord: it does not say, or not by true or false.
    """
    key = next((key for key in LABELS if record.get(key) is not None), None)
    if key is None:
        raise BadRecord("has no 'label'")
    label = record[key]
    if not isinstance(label, bool):
        raise BadRecord(f"'{key}' is {kind_of(label)}, no truth value: true or false")
    return label


def asked_text(record: dict[str, Any], question: str) -> str:
    """What is asked: the question, and below an instruction what is given with it, where there is something."""
    asked = text_of(record[question], f"'{question}'")
    keys = [key for key in BELOW if question == "instruction" and record.get(key) is not None]
    given = {key: text_of(record[key], f"'{key}'", may_be_empty=True) for key in keys}
    texts = {text for text in given.values() if text.strip()}
    if len(texts) > 1:
        raise BadRecord("has an 'input' and a 'context': which of them the instruction is about is not known")
    return "\n\n".join([asked, *texts])


def _pair(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def before_turns(record: dict[str, Any], messages: list[Message]) -> list[Message]:
    """The turns that stand beside a conversation and come before it: ``system``, and the pairs of ``history``."""
    before: list[Message] = []
    for key in ("system", "system_prompt"):
        if record.get(key) in (None, ""):
            continue
        system = text_of(record[key], f"'{key}'", may_be_empty=True)
        own = messages[0]["content"] if messages and messages[0]["role"] in ("system", "developer") else None
        if own is not None and own != system:
            raise BadRecord(f"has two system messages: '{key}' and its first turn")
        if before and system.strip() and before[0]["content"] != system:
            raise BadRecord("has two system messages: 'system' and 'system_prompt'")
        if own is None and system.strip() and not before:
            before = [{"role": "system", "content": system}]
    history = record.get("history")
    if history in (None, "", []):
        return before
    if messages[0]["role"] in ("system", "developer"):
        raise BadRecord("has a 'history', and its own turns begin with a system message")
    if not isinstance(history, list):
        raise BadRecord(f"'history' is {kind_of(history)}, not a list")
    if all(isinstance(turn, dict) for turn in history):
        return before + turns_of(history, "'history'").messages
    for number, pair in enumerate(history, 1):
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRecord(f"'history' {number} is not a pair of a question and an answer")
        asked, said = (text_of(text, f"'history' {number}") for text in pair)
        before += _pair(asked, said)
    return before


def _chat(number: int, record: dict[str, Any], turns: ParsedMessages, context: int = 0) -> ChatRecord:
    if not any(message["role"] == "assistant" for message in turns.messages[context:]):
        raise BadRecord("has no assistant turn" if not context else "its 'completion' has no assistant turn")
    before = before_turns(record, turns.messages)
    shift = len(before)
    return ChatRecord(
        number,
        before + turns.messages,
        context + shift if context else 0,
        frozenset(position + shift for position in turns.muted),
        tools_of(record),
        template_arguments(record),
    )
