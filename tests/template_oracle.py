"""What the assistant has to write in a conversation, by a chat template that transformers alone renders.

Nothing here knows how stackctl lays conversations out. For a turn it lists every prompt that transformers can be made
to render before it, and says of a text behind one of them whether that is what the record has the assistant say.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from chat_tokenizers import byte_level
from jinja2 import TemplateError
from tokenizers import AddedToken

FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
BOS, EOS = "<|oracle_bos|>", "<|oracle_eos|>"
_REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_OPENS = {"<think>": "</think>", "<|channel>thought": "<channel|>"}
_MARKUP = re.compile(r"<[^<>]*>|\[[A-Z_/]+\]")


def tokenizer_of(name: str) -> Any:
    """A byte-level tokenizer with every tag of a template as a token of its own, and that template."""
    template = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = byte_level(bos_token=BOS, eos_token=EOS)
    tags = sorted(set(re.findall(r"<\|[^<>|{}\s]+\|>|<｜[^<>{}\s]+｜>|</?[a-z_]+>", template)))
    tokenizer.add_tokens([AddedToken(tag, special=True, normalized=False) for tag in tags], special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class Wanted:
    """One turn as the record has it."""

    position: int
    thought: str = ""
    answer: str = ""
    calls: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Case:
    """A record as people write it, the same conversation as transformers documents it, and the turns to learn."""

    record: dict[str, Any]
    messages: list[dict[str, Any]]
    wanted: list[Wanted]
    tools: list[Any] | None = None
    only: str = ""
    context: tuple[str, ...] = field(default=())


class Oracle:
    """One template."""

    def __init__(self, name: str) -> None:
        self.tokenizer = tokenizer_of(name)
        self.source = (FOLDER / f"{name}.jinja").read_text()
        self._rendered: dict[str, str | None] = {}

    def render(self, messages: list[dict[str, Any]], **options: Any) -> str | None:
        if "enable_thinking" not in self.source:  # what a template does not name, it does not read
            options.pop("enable_thinking", None)
        key = repr((messages, options))
        if key not in self._rendered:
            try:
                self._rendered[key] = self.tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except _REFUSALS:
                self._rendered[key] = None
        return self._rendered[key]

    def variants(self, case: Case) -> Iterator[tuple[list[dict[str, Any]], list[Any] | None]]:
        """The conversation in every spelling that a template may want: thoughts, calls, contents and roles."""
        thoughts = ("reasoning_content", "reasoning", "thinking", "inline", "dropped")
        if not any(m.get("reasoning_content") for m in case.messages):
            thoughts = ("dropped",)
        calls = any(m.get("tool_calls") for m in case.messages)
        roles = [m["role"] for m in case.messages]
        renamed = [{}]
        if "developer" in roles:
            renamed.append({"developer": "system"})
        if "tool" in roles:
            renamed.append({"tool": "ipython"})
        for thought, text, parts, names, tools in itertools.product(
            thoughts,
            (False, True) if calls else (False,),
            (False, True),
            renamed,
            (case.tools, None) if case.tools else (None,),
        ):
            yield [self._spelled(m, thought, text, parts, names) for m in case.messages], tools

    def _spelled(self, message: dict[str, Any], thought: str, text: bool, parts: bool, names: dict[str, str]) -> Any:
        made = copy.deepcopy(message)
        made["role"] = names.get(made["role"], made["role"])
        if said := made.pop("reasoning_content", None):
            if thought == "inline":
                made["content"] = f"<think>\n{said}\n</think>\n\n{made['content']}"
            elif thought != "dropped":
                made[thought] = said
        if text:
            import json

            for call in made.get("tool_calls", []):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        if parts:
            made["content"] = [{"type": "text", "text": made["content"]}]
        return made

    def prompts(self, case: Case, wanted: Wanted) -> set[str]:
        """Every text that generation may begin behind in this turn."""
        found = set()
        for messages, tools in self.variants(case):
            for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
                text = self.render(messages[: wanted.position], tools=tools, add_generation_prompt=True, **options)
                if text is not None:
                    found.add(text)
        return found

    def can(self, case: Case) -> bool:
        """Whether the template can show all that the record says: then there is a right rendering."""
        for wanted in case.wanted:
            if not any(self._shows(messages, tools, case, wanted) for messages, tools in self.variants(case)):
                return False
        return True

    def _shows(self, messages: list[Any], tools: Any, case: Case, wanted: Wanted) -> bool:
        if case.tools and not tools:
            return False
        prompt = self.render(messages[: wanted.position], tools=tools, add_generation_prompt=True)
        through = self.render(messages[: wanted.position + 1], tools=tools)
        if prompt is None or through is None:
            return False
        if tools:
            bare = self.render(messages[: wanted.position], add_generation_prompt=True) or ""
            if any(prompt.count(t["function"]["name"]) <= bare.count(t["function"]["name"]) for t in tools):
                return False
        seen = [m["content"] for m in case.messages[: wanted.position] if m["role"] != "assistant"]
        if any(text.strip() not in prompt for text in seen):
            return False
        opened = any(prompt.rstrip().endswith(tag) for tag in _OPENS)
        if wanted.thought and not opened and wanted.thought not in through:
            return False
        if wanted.answer.strip() not in through:
            return False
        return all(name in through and all(v in through for v in values) for name, values in wanted.calls)

    def judge(self, case: Case, wanted: Wanted, prompt: str, written: str) -> list[str]:
        """What is wrong with a turn that is learned: nothing, or reasons."""
        wrong = []
        if prompt not in self.prompts(case, wanted):
            wrong.append("no prompt of that moment")
        opened = next((end for tag, end in _OPENS.items() if prompt.rstrip().endswith(tag)), None)
        rest = written
        if opened is not None:
            before, closed, rest = written.partition(opened)
            if not closed:
                wrong.append("the thought is never closed")
            if before.strip() != wanted.thought:
                wrong.append("no thought" if wanted.thought else "an answer inside the thought")
        elif wanted.thought:
            before, found, rest = written.partition(wanted.thought)
            if not found:
                wrong.append("no thought")
                rest = written
            elif sum(before.count(tag) for tag in _OPENS) > 1:
                wrong.append("two thoughts")
        if sum(written.count(end) for end in _OPENS.values()) > 1:
            wrong.append("two thoughts")
        answer = wanted.answer.strip()
        if rest.count(answer) < 1:
            wrong.append("no answer")
        rest = rest.replace(answer, "", 1) if answer else rest
        for name, values in wanted.calls:
            if name not in rest or not all(value in rest for value in values):
                wrong.append("no call")
        if wrong:
            return wrong
        foreign = [m["content"].strip() for m in case.messages if m["role"] != "assistant"]
        if any(text and len(text) > 3 and text in written for text in foreign):
            wrong.append("somebody else's words")
        return wrong + self._ends(case, wanted, written)

    def _ends(self, case: Case, wanted: Wanted, written: str) -> list[str]:
        """A turn ends with what the template puts between it and what comes next, and has no other turn's beginning."""
        said = [wanted.answer.strip(), *(value for _, values in wanted.calls for value in values)]
        last = max(written.rfind(text) + len(text) for text in said if text)
        tail = written[last:]
        marks = _MARKUP.findall(tail)
        if not marks:
            return ["no end of turn"]
        bare = _MARKUP.sub("", tail)
        if re.sub(r"[\s\"'`}\])]", "", bare):
            return [f"goes on with {bare.strip()!r}"]
        opener = self._opener()
        if opener and opener in marks:
            return ["goes on past the end of turn"]
        return ["white space after the end of turn"] if tail != tail.rstrip() else []

    def _opener(self) -> str | None:
        """The tag that begins a turn, by the generation prompt."""
        for content in ("Hi", [{"type": "text", "text": "Hi"}]):
            user = [{"role": "user", "content": content}]
            bare, prompt = self.render(user), self.render(user, add_generation_prompt=True)
            if bare is not None and prompt is not None and prompt.startswith(bare) and prompt != bare:
                found = _MARKUP.match(prompt[len(bare) :].lstrip())
                return found[0] if found and found[0] not in _OPENS else None
        return None
