"""A chat on the terminal: what ``generate`` is without a prompt."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from stackctl.output import Output

if TYPE_CHECKING:
    from stackctl.engine.generation import Sampling
    from stackctl.engine.models import StackedModel


def chat(stacked: StackedModel, sampling: Sampling, output: Output, name: str) -> None:
    """Talk until Ctrl-D; Ctrl-C stops the answer. /reset forgets what was said."""
    from stackctl.engine.generation import generate_reply
    from stackctl.engine.records import Prompt

    output.status(f"{name}: /reset forgets what was said, Ctrl-C stops an answer, Ctrl-D leaves")
    messages: list[dict[str, str]] = []
    while True:
        try:
            sys.stderr.write("> ")
            sys.stderr.flush()
            line = input()
        except (EOFError, KeyboardInterrupt):
            output.text("\n")
            return
        if line.strip() == "/reset":
            messages.clear()
        elif line.strip():
            messages.append({"role": "user", "content": line})
            answer = Heard(output)
            with contextlib.suppress(KeyboardInterrupt):
                generate_reply(stacked, Prompt(line, list(messages)), sampling, answer.hear)
            output.text("\n")
            messages.append({"role": "assistant", "content": answer.text})


class Heard:
    """An answer as far as it has come: printed at once, and kept for the conversation."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self.text = ""

    def hear(self, piece: str) -> None:
        self.text += piece
        self._output.text(piece)
