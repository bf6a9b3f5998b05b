"""What bash does to a word before it asks for completions, undone: it cuts at ``:``, ``@`` and ``=``, too.

Expressions are full of these. What was typed whole is put together again before typer looks at it; of the word that is
being typed only the last piece is asked about, because that is all that bash replaces. zsh and fish keep words whole.
"""

from __future__ import annotations

from collections.abc import MutableMapping

VARIABLE = "_STACKCTL_COMPLETE"
"""Set by the shell while it asks for completions; typer's name for it."""
_CUTS = (":", "@", "=")


def join_words(environment: MutableMapping[str, str]) -> None:
    """Put the pieces of each word together, in the variables in which bash hands over what was typed."""
    if environment.get(VARIABLE) != "complete_bash" or "\n" not in environment.get("COMP_WORDS", ""):
        return
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
    last = "" if typed[-1] in _CUTS else typed[-1]
    environment.update(COMP_WORDS="\n".join([*done, last]), COMP_CWORD=str(len(done)))
