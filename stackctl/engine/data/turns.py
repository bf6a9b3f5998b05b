"""What the assistant has to write in each of its turns, behind the generation prompt of that moment."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from stackctl.engine.data.chat_template import SENTINEL, TEMPLATE_ERRORS, ChatTemplate
from stackctl.engine.data.conversation import Conversation, as_shown, in_block
from stackctl.engine.data.reasoning import ReasonedAnswer, Tag, closes, tag_of, without_empty
from stackctl.engine.data.shared_beginnings import common_prefix
from stackctl.engine.data.turn_text import missing, saying_otherwise, whole_tags
from stackctl.engine.records.types import Message

_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_THINKING = ("enable_thinking", "thinking")
"""What templates call the argument that has the assistant think."""


@dataclass(frozen=True)
class Turn:
    """One turn of the assistant: the text before it, what it has to write up to its end of turn, what is unusual."""

    prompt: str
    written: str
    said: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return self.prompt + self.written


def end_of_turn(tokenizer: Any) -> str:
    """The text that ends an assistant's turn, to stop at; empty when the template has none and EOS ends a turn."""
    return Turns(ChatTemplate(tokenizer)).end.rstrip()


class Turns:
    """How a chat template marks the assistant's turns, found by rendering a sentinel.

    ``lead`` is what stands between the generation prompt and the content (Llama 2: a space; Qwen3: an empty
    ``<think>`` block), ``end`` what follows the content, with the white space after it. ``close`` ends a whole
    conversation, after its last turn's own end (Phi-3: an EOS): it belongs to no turn.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        opening = template.opening
        before, _, self.end = template.render([*opening, _sentinel()]).partition(SENTINEL)
        prompt = template.render(opening, prompt=True)
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        bare = template.render(opening)
        self._begin = prompt.removeprefix(bare) if prompt.startswith(bare) else ""
        begins = self._begin.lstrip(), bare.removeprefix(template.bos).lstrip()
        self._openers = {found[0] for text in begins if (found := _TAG.match(text))}
        self.preamble = self._preamble(bare)
        self.close = self._close(opening)
        self.end = self._ended(self.end.removesuffix(self.close), end="")

    def _preamble(self, bare: str) -> str:
        """What the template says of its own before a conversation without a system message."""
        user = self._template.opening[-1]
        if len(self._template.opening) > 1:
            return ""
        before = bare.partition(user["content"])[0]
        with contextlib.suppress(*TEMPLATE_ERRORS):
            goes_on = self._template.render([user, _sentinel(), {**user, "content": f"{SENTINEL} again"}])
            header = goes_on.partition(SENTINEL)[2].partition(f"{SENTINEL} again")[0]
            own = _TAG.sub("", before[: len(before) - common_prefix(before[::-1], header[::-1])])
            return " ".join(own.split()) if re.search(r"\w\W+\w", own) else ""
        return ""

    def space_after(self, turn: Turn) -> str:
        """The white space that the template puts behind an end of turn: a token may reach over both."""
        end = self.end.rstrip()
        return self.end[len(end) :] if end and turn.written.endswith(end) else ""

    def _close(self, opening: list[Message]) -> str:
        """What the template puts after a last turn, behind that turn's own end; nothing where it puts nothing."""
        try:
            goes_on = self._template.render([*opening, _sentinel(), opening[-1]]).partition(SENTINEL)[2]
        except TEMPLATE_ERRORS:
            return ""
        own = self.end[: whole_tags(self.end, common_prefix(self.end, goes_on))]
        close = self.end[len(own) :]
        return close if _TAG.search(own) or (own.strip() and close == self._template.eos) else ""

    def _ended(self, tail: str, *, end: str) -> str:
        """What follows a turn's last word, without the beginning of another turn, and nothing behind its end or EOS."""
        starts = [at for opener in self._openers if (at := tail.find(opener)) > 0 and tail[:at].strip()]
        tail = tail[: min(starts, default=len(tail))]
        for last in (end, self._template.eos):
            before, found, after = tail.partition(last or "\0")
            tail = before + found if after.strip() else tail
        return tail

    def turn(self, talk: Conversation, position: int) -> Turn:
        """What the assistant writes in its turn at this position.

        Raises:
            ValueError: the template does not show where the turn begins, or nothing of what is in it.
            TEMPLATE_ERRORS: what the template raises.
        """
        return self._last(talk.first(position + 1))

    def _last(self, talk: Conversation) -> Turn:
        """What the assistant writes in the last turn, as for all methods below that take a conversation."""
        message, reasoned = talk.last
        prompt: str | None = None
        with contextlib.suppress(*TEMPLATE_ERRORS):  # some templates cannot render what has no user turn yet
            prompt = self._prompt(talk) if len(talk.messages) > 1 else None
        if prompt is None:
            return self._unprompted(talk)
        written = self._behind(prompt, talk)
        if written is not None and not missing(prompt, written, message, reasoned):
            return Turn(prompt, written, self._added(written, reasoned))
        if reasoned.thought and closes(prompt):
            return self._answer_only(prompt, talk)
        if (tag := tag_of(prompt)) is not None:
            return self._in_opened_thought(prompt, tag, talk)
        if (
            reasoned.thought
            and self._template.thought_key is None
            and (behind := self._behind(prompt, self._without_thought(talk))) is not None
        ):
            given = ReasonedAnswer(reasoned.thought, "", reasoned.written, reasoned.tag)
            return self._checked(prompt, in_block(given) + without_empty(behind, reasoned.tag)[0], talk)
        if written is not None:
            return self._checked(prompt, written, talk)
        moved = ("renders a finished turn after something else than its generation prompt: it is laid out behind it",)
        return self._checked(prompt, self._body(prompt, talk), talk, moved)

    def _in_opened_thought(self, prompt: str, tag: Tag, talk: Conversation) -> Turn:
        """A turn behind a prompt that opens a thought, which a turn without one closes at once."""
        _, reasoned = talk.last
        body, closing = without_empty(self._body(prompt, self._without_thought(talk)), tag)
        space = prompt[len(prompt.rstrip()) :]
        if reasoned.thought:
            given = ReasonedAnswer(reasoned.thought, "", reasoned.written.replace(reasoned.tag.close, tag.close), tag)
            head = in_block(given, opened=prompt)
        else:
            head = closing or (f"{space}{tag.close}\n\n" if space else tag.close)
        return self._checked(prompt, head + body.lstrip("\n"), talk)

    def _without_thought(self, talk: Conversation) -> Conversation:
        return talk.ending_in(as_shown(self._template, *talk.last, thought=False))

    def _answer_only(self, prompt: str, talk: Conversation) -> Turn:
        """A turn with a thought behind a prompt that says there is none: thinking is switched on, or it is left out."""
        for name in _THINKING:
            if name in talk.template:
                continue
            thinking = replace(talk, template={**talk.template, name: True})
            switched = self._prompt(thinking)
            if switched != prompt and not closes(switched):
                turn = self._last(thinking)
                note = f"is told {name}=true for turns with a thought, whose prompt would say that there is none"
                return Turn(turn.prompt, turn.written, (*turn.said, note))
        plain = self._without_thought(talk)
        written = self._behind(prompt, plain)
        if written is None:
            _, reasoned = talk.last
            written, _ = without_empty(self._body(prompt, plain), reasoned.tag)
        note = "begins the answer behind an empty thought: the thought of the record is not learned"
        return Turn(prompt, written, (note,))

    def _unprompted(self, talk: Conversation) -> Turn:
        """A turn that nothing leads to, as the first of a conversation that the assistant begins."""
        finished = self._finished(talk)
        start = self._start(finished, talk)
        return Turn(finished[:start], self._through(finished, start, talk))

    def _prompt(self, talk: Conversation) -> str:
        """What the turn is written behind."""
        return talk.first(len(talk.messages) - 1).render(self._template, prompt=True)

    def _finished(self, talk: Conversation) -> str:
        """Everything up to the end of the turn, and what the template puts behind that before another turn."""
        return talk.render(self._template).removesuffix(self.close)

    def _start(self, finished: str, talk: Conversation) -> int:
        """Where the turn begins, found by a sentinel in its place.

        Raises:
            ValueError: that place is not to be found.
        """
        before = talk.ending_in(_sentinel()).render(self._template).partition(SENTINEL)[0].removesuffix(self.lead)
        if not finished.startswith(before):
            raise ValueError(f"it does not show where message {len(talk.messages)} begins")
        return len(before)

    def _behind(self, prompt: str, talk: Conversation) -> str | None:
        """What a finished turn is behind its prompt, up to its end; None where it does not stand behind that."""
        finished = self._finished(talk)
        return self._through(finished, len(prompt), talk) if finished.startswith(prompt) else None

    def _through(self, finished: str, start: int, talk: Conversation) -> str:
        """A finished turn from where it begins to its end of turn, without what the template puts behind that."""
        turn, end, message = finished[start:].rstrip(), self.end.strip(), talk.messages[-1]
        last = end or message["content"].strip()
        if any(opener in turn for opener in self._openers) or turn.count(last) != 1 or not turn.endswith(last):
            _, after = self._edges(finished, talk)
            tail = finished[after:] if after >= start else ""
            own = self._ended(tail, end=end) if end or message.get("tool_calls") else ""
            finished = finished[: len(finished) - len(tail)] + own
        return self._trimmed(finished[start:])

    def _trimmed(self, written: str) -> str:
        """A turn without the white space behind its end."""
        if written.endswith(self.end):
            return written[: len(written) - len(self.end) + len(self.end.rstrip())]
        bare = written.rstrip()
        return bare if bare.endswith((">", "]")) else written

    def _edges(self, finished: str, talk: Conversation) -> tuple[int, int]:
        """Where what is said in a turn begins and ends in a text, found by saying something else instead."""
        other = self._finished(talk.ending_in(saying_otherwise(talk.messages[-1])))
        before = common_prefix(finished, other)
        after = common_prefix(finished[before:][::-1], other[before:][::-1])
        return before, len(finished) - after

    def _body(self, prompt: str, talk: Conversation) -> str:
        """A finished turn from where its generation prompt ends, though it was rendered after something else.

        Raises:
            ValueError: that place is not to be found.
        """
        finished = self._finished(talk)
        tag = tag_of(prompt)
        same = whole_tags(finished, common_prefix(prompt, finished))
        left = prompt[same:].strip()
        if tag is not None and left in ("", tag.open.strip()):
            return self._through(finished, same, talk)
        begin = self._begin
        if (opened := tag_of(begin)) is not None:
            begin = begin.rstrip().removesuffix(opened.open.rstrip())
        said, _ = self._edges(finished, talk)
        if begin.strip() and (at := finished[:said].rfind(begin)) >= 0:
            return self._through(finished, at + len(begin), talk)
        return self._through(finished, self._start(finished, talk), talk)

    def unseen(self, talk: Conversation, end: int) -> list[str]:
        """The roles of turns before ``end`` of which the template shows nothing, though it shows others of theirs."""
        if not end:
            return []
        prompt = talk.first(end).render(self._template, prompt=True)
        roles = []
        for position, message in enumerate(talk.messages[:end]):
            text = message["content"].strip()
            if message["role"] == "assistant" or text in prompt or json.dumps(text)[1:-1] in prompt:
                continue
            probe = [*talk.messages[:position], {**message, "content": SENTINEL}, *talk.messages[position + 1 : end]]
            try:
                if SENTINEL not in replace(talk, messages=probe).render(self._template, prompt=True):
                    roles.append(message["role"])
            except TEMPLATE_ERRORS:
                continue
        return roles

    def _added(self, written: str, reasoned: ReasonedAnswer) -> tuple[str, ...]:
        if reasoned.thought or not self.lead.strip() or not written.startswith(self.lead):
            return ()
        return (f"puts {self.lead.strip()!r} before an answer: it is learned",)

    def _checked(self, prompt: str, written: str, talk: Conversation, said: tuple[str, ...] = ()) -> Turn:
        """A turn, and in words what is missing in it.

        Raises:
            ValueError: a call is.
        """
        message, reasoned = talk.last
        lost = missing(prompt, written, message, reasoned)
        if "the calls" in lost:
            raise ValueError("it shows nothing of the tool_calls of a turn that says something as well")
        told = [f"drops {what} from a turn: not learned" for what in lost]
        if "the content" in lost and not message.get("tool_calls") and written.removesuffix(self.end.rstrip()).strip():
            told[lost.index("the content")] = "changes the content of a turn: it is learned as it is shown"
        return Turn(prompt, written, (*said, *told))


def _sentinel() -> Message:
    return {"role": "assistant", "content": SENTINEL}
