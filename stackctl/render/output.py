"""The only printer: for a person, as ``--json``, or quiet.

One result reaches stdout; progress, notes and errors go to stderr. A command returns a :class:`Result` and prints
nothing itself.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from stackctl.core.errors import Failed, StackctlError, explain_oserror
from stackctl.render.terminal import Painted, laid_out, printable, show_paged, width_of
from stackctl.storage.files import json_line

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

JSON_SCHEMA = 1
_PIPED_WIDTH = 160
"""Columns when nobody's terminal says otherwise: wide enough that piped tables are not cut."""
_REMEMBERED = 600
"""Seconds that say how fast something goes; rich's 30 know nothing where a step takes as long."""
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_SEGMENTS = 50
"""How many pieces of rich's are turned into text at once."""

_HINTS = {
    "usage": "stackctl --help",
    "not_found": "stackctl ls shows what there is",
    "incompatible": "stackctl inspect shows what it is and what it needs",
    "verification_failed": "restore the files from where they came; stackctl verify checks everything",
}
"""What an error without a hint of its own says: an error always has two lines."""


@dataclass(frozen=True)
class Result:
    """What a command did: ``json`` for programs, ``brief`` for ``-q``, ``screen`` for a person.

    ``screen`` is text, or a function that makes something rich can print (so that rich is imported only then); with
    ``paged``, what is longer than a person's screen goes through their pager. A list in ``json`` may be an iterator.
    ``exit_code`` is not 0 where a command reports what it found wrong (``verify``) instead of failing.
    """

    json: dict[str, Any]
    brief: str
    screen: str | Callable[[], RenderableType] = ""
    exit_code: int = 0
    notes: tuple[str, ...] = field(default=())
    paged: bool = False


class _LineTracker:
    """stderr that knows whether the cursor is at the start of a line (other people's progress bars leave it amid)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.at_start = True

    def write(self, text: str) -> int:
        if shown := _ESCAPE.sub("", text):
            self.at_start = shown.endswith("\n")
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare_streams() -> None:
    """Make sure that ``error:`` can always start a line, and that a file name which is no Unicode can be written.

    A stream that was closed by whoever started the command (``<&-``, ``>&-``) is empty, or takes what nobody reads.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    if not isinstance(sys.stderr, _LineTracker):
        sys.stderr = _LineTracker(sys.stderr)  # type: ignore[assignment]
    if isinstance(sys.stdout, io.TextIOWrapper):
        codecs.register_error("stackctl", _written_all_the_same)
        sys.stdout.reconfigure(errors="stackctl")


def release_streams() -> None:
    """Drop what a stream cannot take any more: Python would fail with it, and an exit code of its own, at the end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _written_all_the_same(error: UnicodeError) -> tuple[str | bytes, int]:
    """What a stream's encoding lacks: as UTF-8 if that is what it is, else as JSON, too, escapes half a character.

    Under a locale that knows ASCII alone, the names of files come as the bytes of UTF-8, one by one.
    """
    assert isinstance(error, UnicodeEncodeError)
    try:
        written = error.object[error.start : error.end].encode("utf-8", "surrogateescape")
        written.decode("utf-8")
    except UnicodeError:
        return codecs.backslashreplace_errors(error)
    return written, error.end


class Output:
    """Where a command's words go."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False) -> None:
        self.json_mode = json_mode
        self.quiet = quiet

    # -- stdout -------------------------------------------------------------------------------------------------

    def emit(self, result: Result) -> None:
        """Print a command's result in the form that was asked for.

        Raises:
            Failed: stdout takes no more, as where it goes to a file on a full disk.
        """
        for note in result.notes:
            self.note(note)
        try:
            self._emit(result)
        except BrokenPipeError:
            raise
        except OSError as error:
            if error.filename:
                raise
            raise Failed(
                f"the command is done, but its result cannot be written: {explain_oserror(error).message}",
                hint="free some space for the output; stackctl ls shows what is registered",
            ) from error

    def _emit(self, result: Result) -> None:
        if self.json_mode:
            self.line_json(result.json)
        elif self.quiet:
            if result.brief:
                self.text(result.brief + "\n")
        elif callable(result.screen):
            screen = console(sys.stdout)
            pieces = _pieces(screen, result.screen())
            if result.paged:
                show_paged(pieces, screen.height)
            else:
                sys.stdout.writelines(pieces)
                sys.stdout.flush()
        elif result.screen:
            self.text(laid_out(printable(result.screen), sys.stdout) + "\n")

    def line_json(self, document: dict[str, Any]) -> None:
        """One JSON document on one line of stdout; what is an iterator becomes a list, written item by item."""
        whole = {"schema": JSON_SCHEMA, **document}
        before = "{"
        for key, value in [(k, v if isinstance(v, Iterator) else [json_line(v)]) for k, v in whole.items()]:
            sys.stdout.write(f"{before}{json_line(key)}: ")
            sys.stdout.writelines(_json_list(value) if isinstance(value, Iterator) else value)
            before = ", "
        self.text("}\n")

    def text(self, text: str) -> None:
        """Verbatim text on stdout, at once."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def speech(self, text: str) -> None:
        """What a model says, at once: verbatim into a file or a pipe, fit to be shown on a terminal."""
        self.text(printable(text) if sys.stdout.isatty() else text)

    # -- stderr -------------------------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Something that a person should know, on stderr; not with ``-q``."""
        if not self.quiet:
            self._line(f"note: {printable(text)}")

    def status(self, text: str) -> None:
        """What is being done now, on stderr; not with ``-q``."""
        if not self.quiet:
            self._line(text if isinstance(text, Painted) else printable(text))

    def _line(self, text: str) -> None:
        beside_a_bar = hasattr(sys.stderr, "rich_proxied_file")  # rich makes room above it
        start = "" if beside_a_bar or getattr(sys.stderr, "at_start", True) else "\n"
        shown = text if isinstance(text, Painted) else laid_out(text, sys.stderr)
        sys.stderr.write(f"{start}{shown}\n")
        sys.stderr.flush()

    def error(self, error: StackctlError) -> None:
        """``error:`` and ``hint:`` on stderr; with ``--json`` the same on stdout."""
        message = printable(" ".join(error.message.split()))
        self._line(f"error: {message}")
        hint = error.hint or _HINTS.get(error.code, "run it again with --debug to see where it happened")
        self._line(f"hint: {printable(' '.join(hint.split()))}")
        if self.json_mode:
            self.line_json({"error": {"code": error.code, "message": error.message, "hint": hint}})

    @contextlib.contextmanager
    def progress(self, *columns: Any, stays: bool = False) -> Iterator[Progress]:
        """A rich progress bar on stderr, gone afterwards unless it ``stays``; none without a terminal, or with ``-q``.

        Left to itself, rich would send to stderr what a command prints on stdout while a bar is up.
        """
        from rich.progress import Progress

        screen = console(sys.stderr)
        disabled = self.quiet or not screen.is_terminal
        shown = columns or Progress.get_default_columns()
        with Progress(
            *shown, console=screen, disable=disabled, redirect_stdout=False, transient=not stays,
            speed_estimate_period=_REMEMBERED,
        ) as progress:  # fmt: skip
            yield progress

    @property
    def shows_progress(self) -> bool:
        return not self.quiet and sys.stderr.isatty()


def _json_list(items: Iterator[Any]) -> Iterator[str]:
    yield "["
    for number, item in enumerate(items):
        yield f", {json_line(item)}" if number else json_line(item)
    yield "]"


_BLANKS = re.compile(r" +\n")


def _pieces(screen: Console, what: RenderableType) -> Iterator[str]:
    """What a console would print, as text, some lines at a time.

    A line to copy is whole, however long, and has no blanks at its end when it is piped.
    """
    from rich.segment import Segments

    segments = iter(screen.render(what))
    while some := list(itertools.islice(segments, _SEGMENTS)):
        with screen.capture() as captured:
            screen.print(Segments(some), end="", crop=False)
        yield captured.get() if screen.is_terminal else _BLANKS.sub("\n", captured.get())


def console(stream: TextIO) -> Console:
    """A rich console that obeys NO_COLOR (for bold and dim, too) and does not cut what is piped."""
    from rich.console import Console
    from rich.segment import Segment

    class Printable(Console):
        """A console that shows what it is given and does not obey it."""

        def render(self, *arguments: Any, **options: Any) -> Iterator[Segment]:
            for segment in super().render(*arguments, **options):
                yield segment if segment.control else Segment(printable(segment.text), segment.style)

    columns = os.environ.get("COLUMNS", "")
    width = width_of(stream) or (int(columns) if columns.isdecimal() else 0) or _PIPED_WIDTH
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Printable(
        file=stream, width=width, color_system=colours, highlight=False, markup=False, soft_wrap=False, emoji=False
    )  # fmt: skip
