"""One family of expected failures: a message, a stable code, an exit code, a hint.

Anything else that is raised is a bug and is reported as one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
_MESSAGE_WORD, _HINT_WORD = 300, 2000
"""Characters of one word, such as a path or an expression; a hint is to be typed, and so cut only when nobody would."""


def shorten_words(text: str, most: int) -> str:
    """A text in which words of more than ``most`` characters, which somebody typed or a file holds, are cut."""
    if len(text) <= most:
        return text
    return re.sub(rf"\S{{{most + 1},}}", lambda word: f"{word[0][: most // 5]}…{word[0][-(most // 10) :]}", text)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a message: the first few, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


SHOWN_PROBLEMS = 5


def listed_problems(problems: Sequence[str], count: int = 0) -> str:
    """What is wrong, in one message: the first few, and how many more there are; ``count`` where not all are kept."""
    more = max(count, len(problems)) - SHOWN_PROBLEMS
    return "; ".join(problems[:SHOWN_PROBLEMS]) + (f"; and {more} more" if more > 0 else "")


class StackctlError(Exception):
    """An expected failure. ``message`` says what is wrong, ``hint`` what to type or do next."""

    code = "failed"
    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = shorten_words(message, _MESSAGE_WORD)
        super().__init__(message)
        self.message = message
        self.hint = shorten_words(hint, _HINT_WORD) if hint else hint


class Failed(StackctlError):
    """The work could not be done: a full disk, a loss that is not a number."""


class Usage(StackctlError):
    """Wrong usage: an option, a name, an expression, a file that a person wrote."""

    code = "usage"
    exit_code = 2


class MergeConflict(Usage):
    """A file in which git left both sides of a merge."""


class UnreadableEntry(Usage):
    """A file of the registry that cannot be read, or does not hold together."""


class NotFound(StackctlError):
    """A name, a version, a file or a repository that is not there."""

    code = "not_found"
    exit_code = 3


class Incompatible(StackctlError):
    """Things that are fine apart and cannot be used together, or not by stackctl."""

    code = "incompatible"
    exit_code = 4


class VerificationFailed(StackctlError):
    """Bytes or numbers are not what was recorded or promised."""

    code = "verification_failed"
    exit_code = 5


class HubFailure(StackctlError):
    """The Hub or the network said no, or nothing."""

    code = "hub"
    exit_code = 6


class Interrupted(StackctlError):
    """Ctrl-C."""

    code = "interrupted"
    exit_code = 130


class Terminated(Interrupted):
    """SIGTERM, which is how clusters take a machine back."""

    exit_code = 143


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, on one line; its type when it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def closest(word: str, candidates: list[str] | tuple[str, ...]) -> str | None:
    """The candidate nearest to a mistyped word, or None when none is near."""
    import difflib

    found = difflib.get_close_matches(word, candidates, n=1, cutoff=0.6)
    return found[0] if found else None


_ASIDE = 80
"""Characters of what a hint says besides the nearest word: a long list of all words would bury it."""


def did_you_mean(word: str, candidates: list[str] | tuple[str, ...], otherwise: str) -> str:
    """A hint that names the nearest candidate, and ``otherwise`` when none is near or it is short."""
    near = closest(word, candidates)
    if near is None:
        return otherwise
    return f"did you mean '{near}'?" + (f" ({otherwise})" if len(otherwise) <= _ASIDE else "")


@contextlib.contextmanager
def gathering(problems: list[StackctlError]) -> Iterator[None]:
    """Do something and put what is wrong with it among ``problems``, for :func:`raise_all` to say with the rest."""
    try:
        yield
    except StackctlError as error:
        problems.append(error)


def attempt(problems: list[StackctlError], check: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What ``check`` returns; None when it fails, and then why is among ``problems``."""
    with gathering(problems):
        return check(*arguments, **options)


def attempt_each(check: Callable[[Item], Any], items: Iterable[Item]) -> list[Any]:
    """What ``check`` returns of each item.

    Raises:
        StackctlError: everything that is wrong with any of them, at once.
    """
    problems: list[StackctlError] = []
    found = [attempt(problems, check, item) for item in items]
    raise_all(problems)
    return found


def raise_all(problems: Iterable[StackctlError]) -> None:
    """Raise what was found wrong, all of it at once; nothing when nothing was.

    The first problem gives the code; its siblings are joined to it.
    """
    if found := list(problems):
        raise joined(found)


def joined(problems: list[StackctlError]) -> StackctlError:
    """One error of one or more."""
    first = problems[0]
    if len(problems) == 1:
        return first
    hints = dict.fromkeys(p.hint for p in problems if p.hint)
    messages = dict.fromkeys(p.message for p in problems)
    return type(first)("; ".join(messages), hint="; ".join(hints) or None)


_LONGEST_NAME = 300
"""Characters of a path that a message shows; what is longer is cut in the middle."""


_REPEATED = re.compile(r"\(os error (\d{1,5})\)")
"""How libraries in Rust, such as safetensors and tokenizers, repeat what the operating system said."""


def system_error(error: BaseException) -> OSError | None:
    """What the operating system said, as the error itself or as the words of a library; None where it said nothing."""
    if isinstance(error, OSError):
        return error
    found = _REPEATED.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def memory_error(error: BaseException) -> Failed | None:
    """What an allocator said: torch's of a device, which light code knows by its name, or Python's; else None."""
    if type(error).__name__ == "OutOfMemoryError":
        hint = "end what else uses it, or use --dtype bfloat16 or --device cpu where the command has them"
        return Failed("the device's memory is full", hint=hint)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return Failed("main memory is full", hint="end what else uses it and run the command again")
    return None


def explain_oserror(error: OSError) -> Failed | Usage:
    """An operating-system error as one sentence and a way on: wrong usage where a path was typed that none can be."""
    name = str(error.filename or "")
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME // 2]}…{name[-_LONGEST_NAME // 2 :]}"
    where = f" ({name})" if name else ""
    hints = {
        errno.ENOENT: "it was removed meanwhile, or nothing can be made there: run the command again",
        errno.ENOSPC: "free some space and run the command again",
        errno.EDQUOT: "free some of your quota and run the command again",
        errno.EACCES: "check who owns the folder and its permissions",
        errno.EPERM: "check who owns the folder and its permissions",
        errno.EROFS: "the file system is read-only: choose another place with --registry or --out",
        errno.EFBIG: "a limit is in the way (ulimit -f), or the file system takes no larger: choose another place",
        errno.EMFILE: "raise the limit of open files: ulimit -n 4096",
        errno.ENAMETOOLONG: "choose a shorter path",
    }
    reason = error.strerror or first_line(error)
    hint = hints.get(error.errno or 0)
    if "temporary directory" in reason:  # the words of Python's tempfile, under the number of a missing file
        hint = "name a folder that can be written to: export TMPDIR=DIR"
    kind = Usage if error.errno == errno.ENAMETOOLONG else Failed
    return kind(f"{reason[:1].lower()}{reason[1:]}{where}", hint=hint)
