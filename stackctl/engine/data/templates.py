"""How a chat template lays conversations out, and where the assistant speaks in them."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from stackctl.engine.data.examples import Layout
from stackctl.engine.records import ChatRecord, Message
from stackctl.errors import Usage, first_line

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What a base without a chat template gets."""

_SENTINEL = "Sentinel7f3a9c"
_SENTINEL_TURN = {"role": "assistant", "content": _SENTINEL}
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError)


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
    return Turns(tokenizer).end.rstrip()


class Turns:
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
        except TEMPLATE_ERRORS as error:
            raise Usage(f"the chat template fails on a user and an assistant turn ({first_line(error)})") from None
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
        except TEMPLATE_ERRORS:
            prompt = None  # some templates cannot render what has no user turn yet
        if prompt is not None and through.startswith(prompt):
            return through, len(prompt), end, True
        before = self.render([*messages[:position], _SENTINEL_TURN]).partition(_SENTINEL)[0].removesuffix(self.lead)
        if not through.startswith(before):
            raise ValueError(f"it does not show where message {position + 1} begins")
        if prompt is None:
            return through, len(before), end, True
        return prompt + through[len(before) :], len(prompt), end - len(before) + len(prompt), False

    def layouts(self, record: ChatRecord) -> tuple[list[Layout], bool]:
        """Every assistant turn in as few texts as possible, and whether every turn follows its own prompt.

        One text holds them all when the template renders a turn the same whether or not others follow. Qwen3's does
        not (it takes ``<think>`` out of earlier turns): then a turn has a text of its own, that of inference.
        """
        layouts: list[Layout] = []
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
                layouts.append(Layout(text, [(start, end)], ends=not self.end.strip()))
        for layout in layouts:
            if layout.ends:
                layout.text = layout.text[: layout.spans[-1][1]]
        return layouts[::-1], regular
