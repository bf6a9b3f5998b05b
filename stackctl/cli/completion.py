"""What a shell does to the word that it wants completed, undone; and the answer, as that shell can use it.

bash cuts words at ``:``, ``@`` and ``=``, of which expressions are full, and replaces only the last piece. zsh and fish
keep words whole, also ``--on=st``, of which typer looks at what stands behind ``=`` alone. So typer is asked about
whole words, an option apart from its value, and what it says is cut, or put together, for the shell.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator, MutableMapping

VARIABLE = "_STACKCTL_COMPLETE"
"""Set by the shell while it asks for completions; typer's name for it."""
_TYPED = "_TYPER_COMPLETE_ARGS"
_CUTS = (":", "@", "=")
_VALUE = re.compile(r"(.*\s)(--[a-z][a-z-]*)=(\S*)", re.DOTALL)
"""A line that ends with the value of an option."""

FormatAnswer = Callable[[str], str]


@contextlib.contextmanager
def completing(environment: MutableMapping[str, str]) -> Iterator[None]:
    """While the body answers a shell that asks for completions, both understand each other."""
    asked = {"complete_bash": ask_bash, "complete_zsh": ask_zsh, "complete_fish": ask_fish}
    ask = asked.get(environment.get(VARIABLE, ""))
    answer = ask(environment) if ask else None
    if answer is None:
        yield
        return
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        sys.stdout.write(answer(said.getvalue()))


def ask_bash(environment: MutableMapping[str, str]) -> FormatAnswer | None:
    """Put the pieces of each word together; of the last one, bash wants what follows its own last piece."""
    if "\n" not in environment.get("COMP_WORDS", ""):
        return None
    current = int(environment["COMP_CWORD"])
    words: list[list[str]] = []
    for piece in environment["COMP_WORDS"].split("\n")[: current + 1]:
        if len(words) > 1 and piece and (piece[0] in _CUTS or words[-1][-1].endswith(_CUTS)):
            words[-1].append(piece)
        else:
            words.append([piece])
    typed = words.pop()
    done = ["".join(word) for word in words]
    if typed[0].startswith("-") and len(typed) > 1:  # an option and its value
        done.append(typed[0])
        typed = typed[2:]
    word = "".join(typed)
    cut = max(map(word.rfind, _CUTS))
    there = word[: cut if word[cut:].startswith("@") else cut + 1]  # an @ is replaced along with what follows it
    environment.update(COMP_WORDS="\n".join([*done, word]), COMP_CWORD=str(len(done)))
    return lambda said: "".join(line.removeprefix(there) for line in said.splitlines(keepends=True))


def ask_zsh(environment: MutableMapping[str, str]) -> FormatAnswer | None:
    """Part an option from its value; zsh is told that the option is there."""
    return (lambda said: f"compset -P 1 '*='; {said}") if _part_value(environment) else None


def ask_fish(environment: MutableMapping[str, str]) -> FormatAnswer | None:
    """Part an option from its value; fish wants both back."""
    option = _part_value(environment)
    if not option:
        return None
    return lambda said: "".join(f"{option}={line}" for line in said.splitlines(keepends=True))


def _part_value(environment: MutableMapping[str, str]) -> str | None:
    """The option whose value is being typed, which is then a word of its own; None where none is."""
    found = _VALUE.fullmatch(environment.get(_TYPED, ""))
    if not found:
        return None
    line, option, value = found.groups()
    environment[_TYPED] = f"{line}{option} {value}"
    return option
