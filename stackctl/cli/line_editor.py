"""The line that a chat reads: edited, remembered and completed by prompt_toolkit, which is imported only there."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from stackctl.storage.paths import cache_root

Complete = Callable[[str], Iterable[tuple[str, str]]]
"""What may stand instead of the last word of some text: that word, and the text that replaces it."""


class LineEditor:
    """Reads what a person types, one message at a time. Alt-Enter, or a backslash at its end, begins another line."""

    def __init__(self, complete: Complete) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import Completer, Completion
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import create_output

        class Completing(Completer):
            def get_completions(self, document: Any, complete_event: Any) -> Iterator[Completion]:
                for word, text in complete(document.text_before_cursor):
                    yield Completion(text, start_position=-len(word))

        keys = KeyBindings()

        @keys.add("escape", "enter")
        def _(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        # The prompt goes to stderr, so that stdout holds answers alone when it is redirected.
        self._session: PromptSession[str] = PromptSession(
            history=_history(),
            completer=Completing(),
            complete_while_typing=False,
            key_bindings=keys,
            output=create_output(stdout=sys.stderr),
        )

    def read(self, prompt: str) -> str:
        """What was typed, with the line breaks in it.

        Raises:
            EOFError, KeyboardInterrupt: Ctrl-D on an empty line; Ctrl-C.
        """
        lines = [self._session.prompt(prompt)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._session.prompt("… ".rjust(len(prompt))))
        return "\n".join(lines)


def _history() -> Any:
    """What was typed in earlier chats, readable by its owner only; in memory where it cannot be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path: Path = cache_root() / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("ab"):
            return FileHistory(path)
    except OSError:
        return InMemoryHistory()
