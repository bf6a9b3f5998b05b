"""How a chat template lays conversations out, and where the assistant speaks in them."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from stackctl.core.errors import Usage, first_line
from stackctl.engine.data.examples import Layout
from stackctl.engine.records import ChatRecord, Message

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What a base without a chat template gets."""

_SENTINEL = "Sentinel7f3a9c"
_OPENING: list[Message] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
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
    ``<think>`` block), ``end`` what follows the content, with the white space after it. ``close`` ends a whole
    conversation, after its last turn's own end (Phi-3: an EOS): it belongs to no turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise Usage(
                "the tokenizer has no chat template, which conversations need",
                hint="use a base with a chat template, or records of {'text'} or {'prompt', 'completion'}",
            )
        opening, laid_out = self._opening()
        before, found, self.end = laid_out.partition(_SENTINEL)
        prompt = self.render(opening, prompt=True)
        if not found:
            raise Usage("the chat template does not render what the assistant says")
        self.lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        self.close = self._close(opening)
        self.end = self.end.removesuffix(self.close)

    def _opening(self) -> tuple[list[Message], str]:
        """The shortest conversation that the template takes, up to the assistant, and how it renders that and a turn.

        Raises:
            Usage: it takes neither a user's message nor a system's before it.
        """
        refused: Exception | None = None
        for opening in (_OPENING[1:], _OPENING):  # some templates want a system message
            try:
                self.render(opening, prompt=True)
                return opening, self.render([*opening, _SENTINEL_TURN])
            except TEMPLATE_ERRORS as error:
                refused = refused or error
        assert refused
        raise Usage(f"the chat template fails on a user and an assistant turn ({first_line(refused)})") from refused

    def _close(self, opening: list[Message]) -> str:
        """What the template puts after a last turn, behind that turn's own end; nothing where it puts nothing."""
        eos = self._tokenizer.eos_token or ""
        own = self.end.removesuffix(eos)
        if not eos or own == self.end or not own.strip():
            return ""
        try:
            goes_on = self.render([*opening, _SENTINEL_TURN, opening[-1]]).partition(_SENTINEL)[2]
        except TEMPLATE_ERRORS:
            return ""
        return eos if goes_on.startswith(own) and not goes_on.startswith(self.end) else ""

    def render(self, messages: list[Message], *, prompt: bool = False) -> str:
        text: str = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return text

    def turn(self, messages: list[Message], position: int) -> tuple[str, int, int, bool]:
        """The text up to the end of one assistant turn, the span of that turn, and whether a prompt leads to it.

        The span begins where generation would, after the generation prompt of what comes before. Where the template
        renders the finished turn after something else than that prompt (Mistral's puts a system message only into
        the *last* user turn), the turn is put behind the prompt: that is what generation will see.
        """
        through = self.render(messages[: position + 1]).removesuffix(self.close)
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
