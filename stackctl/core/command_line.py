"""The command that was typed, as it is typed again: what hints tell people to paste into their shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class CommandLine:
    """A command as its words; ``str()`` quotes them for a shell."""

    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    def having(self, option: str, value: str | None = None) -> CommandLine:
        """The same command with an option: in the place of the value that it has, else behind the rest.

        A switch has no ``value``. Options end at ``--``.
        """
        end = self.words.index("--") if "--" in self.words else len(self.words)
        options, rest = list(self.words[:end]), self.words[end:]
        given = [option] if value is None else [option, value]
        for index, word in enumerate(options):
            if word == option:
                return CommandLine((*options[:index], *given, *options[index + len(given) :], *rest))
            if value is not None and word.startswith(f"{option}="):
                return CommandLine((*options[:index], *given, *options[index + 1 :], *rest))
        return CommandLine((*options, *given, *rest))

    def naming(self, argument: str, instead: str) -> CommandLine:
        """The same command with another word in the place of an argument."""
        place = self.words.index(argument) if argument in self.words else len(self.words)
        return CommandLine((*self.words[:place], instead, *self.words[place + 1 :]))

    def without(self, option: str, *, value: bool = False) -> CommandLine:
        """The same command without an option, and without its value where it takes one."""
        end = self.words.index("--") if "--" in self.words else len(self.words)
        kept: list[str] = []
        skipped = False
        for word in self.words[:end]:
            if skipped or word == option:
                skipped = not skipped and value
            elif not (value and word.startswith(f"{option}=")):
                kept.append(word)
        return CommandLine((*kept, *self.words[end:]))


def typed() -> CommandLine:
    """What was typed, with the name by which a shell finds stackctl here, else the path that it was called by."""
    program = sys.argv[0]
    if shutil.which("stackctl") or program == "stackctl":
        words = ["stackctl"]
    else:
        words = [sys.executable, "-m", "stackctl"] if program.endswith(".py") else [program]
    return CommandLine((*words, *sys.argv[1:]))
