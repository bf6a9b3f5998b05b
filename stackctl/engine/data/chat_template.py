"""A tokenizer's chat template as it renders a conversation, and what it can show of one."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError

from stackctl.core.errors import Usage, first_line
from stackctl.engine.data.reasoning import Tag, tags_in
from stackctl.engine.libraries import replaced
from stackctl.engine.records.types import Message
from stackctl.lora.checkpoint import templates_of
from stackctl.plan.stack_plan import StackPlan

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What a base without a chat template gets."""

SENTINEL = "Sentinel7f3a9c"
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
_USER: Message = {"role": "user", "content": "Hello"}
_SYSTEM: Message = {"role": "system", "content": "Be brief."}
_INSTEAD = {"developer": "system", "function": "tool", "ipython": "tool", "tool": "ipython"}
"""What a role is rendered as where the template has none of its own for it."""
_DATE = "STACKCTL_TEMPLATE_DATE"


def adopt_chat_template(tokenizer: Any, base: str, plans: Iterable[StackPlan]) -> str | None:
    """Give the tokenizer of a base without a chat template the one that its adapters bring, and what to say of it.

    A base's own template is left as it is. Else it is that of the newest member of the first stack in which some member
    has one, since that is what the member was trained with; None where nobody has one.
    """
    if tokenizer.chat_template:
        return None
    found = [pair for plan in plans for pair in templates_of(plan.folders)]
    if not found:
        return None
    label, tokenizer.chat_template = found[0]
    others = sorted({other for other, template in found if template != tokenizer.chat_template})
    differ = f"; {', '.join(others)} would have another one" if others else ""
    return f"the base '{base}' has no chat template: that of {label} is used{differ}"


def ensure_chat_template(tokenizer: Any) -> bool:
    """Give a tokenizer without a chat template ChatML; True when it had none.

    Where the tokenizer puts a BOS before a text, ChatML gets it as well: some bases are lost without one.
    """
    if tokenizer.chat_template:
        return False
    begins = bool(prefix_ids(tokenizer)) and tokenizer.bos_token is not None
    tokenizer.chat_template = "{{ bos_token }}" + CHATML if begins else CHATML
    return True


def choose_chat_template(tokenizer: Any, base: str, plan: StackPlan, *, raw: bool = False) -> str | None:
    """See that the tokenizer of a base has a chat template: its own, else a member's, else ChatML, which ``raw`` text
    does without; and what to say of one that is not its own."""
    told = adopt_chat_template(tokenizer, base, [plan])
    if not raw and ensure_chat_template(tokenizer):
        return f"the base '{base}' has no chat template: ChatML is used"
    return told


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text of its own accord; those it puts after are not wanted."""
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def run_date() -> datetime:
    """The date that templates with ``strftime_now`` show: one for a whole run, whatever midnight passes.

    It is handed on to the processes that a run starts. It has no time of day: that would be another in every run.
    """
    return datetime.fromisoformat(os.environ.setdefault(_DATE, datetime.now().date().isoformat()))


def fix_date(date: Any) -> None:
    """Have this run show the date of another, as one that is resumed does; None leaves it at today."""
    if isinstance(date, str):
        os.environ[_DATE] = datetime.fromisoformat(date).date().isoformat()


def shown_date(tokenizer: Any) -> str | None:
    """The date that the chat template shows in this run, where it shows one."""
    return run_date().date().isoformat() if is_dated(tokenizer) else None


def is_dated(tokenizer: Any) -> bool:
    """Whether the chat template shows a date."""
    return "strftime_now" in json.dumps(tokenizer.chat_template or "")


@contextlib.contextmanager
def at_date(date: datetime) -> Iterator[None]:
    """The date that transformers' ``strftime_now`` shows, which it takes from the clock and from nowhere else."""
    renders: Any = sys.modules.get("transformers.utils.chat_template_utils")

    class Fixed(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return date

    # Where nobody renders by transformers there is nothing to replace.
    with replaced(renders, "datetime", Fixed) if renders else contextlib.nullcontext():
        yield


class ChatTemplate:
    """How a tokenizer's chat template takes conversations: which roles, thoughts, calls and contents it shows.

    ``opening`` is the shortest conversation up to the assistant that it takes.

    Raises:
        Usage: there is no template, or it fails on the simplest conversation.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise Usage(
                "the tokenizer has no chat template, which conversations need",
                hint="use a base with a chat template, or records of {'text'} or {'prompt', 'completion'}",
            )
        self._dated = is_dated(tokenizer)
        self._roles: dict[str, tuple[str, bool]] = {}
        self._in_parts = False
        self.opening = self._opening()

    @property
    def eos(self) -> str:
        return self._tokenizer.eos_token or ""

    @property
    def bos(self) -> str:
        return self._tokenizer.bos_token or ""

    def render(
        self,
        messages: Sequence[Message],
        *,
        prompt: bool = False,
        tools: list[Any] | None = None,
        template: dict[str, Any] | None = None,
    ) -> str:
        """The text of a conversation, with the generation prompt behind it if it is asked for.

        Raises:
            TEMPLATE_ERRORS: what the template raises.
        """
        if self._in_parts:
            messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
        with at_date(run_date()) if self._dated else contextlib.nullcontext():
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt, **(template or {})
            )
        return text

    def _shows(self, *messages: Message) -> bool:
        """Whether the sentinel comes through."""
        try:
            return SENTINEL in self.render(messages)
        except TEMPLATE_ERRORS:
            return False

    def _opening(self) -> list[Message]:
        refused: Exception | None = None
        spoken = {"role": "assistant", "content": SENTINEL}
        for self._in_parts in (False, True):  # some templates take contents as lists of parts only
            for opening in ([_USER], [_SYSTEM, _USER]):  # some want a system message
                try:
                    self.render(opening, prompt=True)
                    if SENTINEL in self.render([*opening, spoken]):
                        return opening
                except TEMPLATE_ERRORS as error:
                    refused = refused or error
        if refused is None:
            raise Usage("the chat template does not render what the assistant says")
        raise Usage(f"the chat template fails on a user and an assistant turn ({first_line(refused)})") from refused

    @functools.cached_property
    def tags(self) -> tuple[Tag, ...]:
        """What marks a thought in a content."""
        return tags_in(json.dumps(self._tokenizer.chat_template, ensure_ascii=False))

    @functools.cached_property
    def thought_key(self) -> str | None:
        """Under which key of a turn the template takes its thought, if it has one."""
        for key in ("reasoning_content", "reasoning", "thinking"):
            if self._shows(*self.opening, {"role": "assistant", "content": "Yes", key: SENTINEL}):
                return key
        return None

    @functools.cached_property
    def arguments_as_text(self) -> bool | None:
        """Whether a call's arguments are given as JSON text instead of an object; None where calls are not shown."""
        for as_text in (False, True):
            if self._shows(*self.opening, _call({SENTINEL: "x"}, as_text=as_text)):
                return as_text
        return None

    @functools.cached_property
    def wants_call_ids(self) -> bool:
        """Whether calls are shown only if they have an id, as Mistral's are."""
        if self.arguments_as_text is None:
            return False
        call = _call({SENTINEL: "x"}, as_text=self.arguments_as_text)
        call["tool_calls"] = [{key: value for key, value in call["tool_calls"][0].items() if key != "id"}]
        return not self._shows(*self.opening, call)

    def role(self, role: str) -> tuple[str, bool]:
        """What a role is to be called so that the template shows it, and whether it shows it at all."""
        if role not in self._roles:
            self._roles[role] = self._find_role(role)
        return self._roles[role]

    def _find_role(self, role: str) -> tuple[str, bool]:
        for name in (role, _INSTEAD.get(role, role)):
            turn: Message = {"role": name, "content": SENTINEL}
            if name in ("system", "developer"):
                tries = [[turn, _USER]]
            elif name in ("tool", "function", "ipython"):
                named = {**turn, "name": "f", "tool_call_id": "call00001"}
                as_text = bool(self.arguments_as_text)
                tries = [[*self.opening, _call({"a": "x"}, as_text=as_text), named], [*self.opening, turn]]
            else:
                return role, True
            if any(self._shows(*messages) for messages in tries):
                return name, True
        return "system" if role == "developer" else role, False


def _call(arguments: dict[str, Any], *, as_text: bool) -> Message:
    function = {"name": "f", "arguments": json.dumps(arguments) if as_text else arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }
