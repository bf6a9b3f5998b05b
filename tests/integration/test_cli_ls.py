"""``ls`` on a terminal: paged when it is longer than the screen."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal

PAGER = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
lines = sys.stdin.read().splitlines()
print(f"{len(lines)} lines came", flush=True)
print(f"typed: {open('/dev/tty').readline()}", flush=True)
"""


@pytest.fixture
def on_terminal(filled_registry, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """A command on a terminal of so many lines, with a pager that counts lines and waits for somebody to type."""
    pager = tmp_path / "pager.py"
    pager.write_text(PAGER)
    opened = []

    def run(lines: int, *arguments: str) -> Terminal:
        environment = {"LINES": str(lines), "STACKCTL_PAGER": f"{sys.executable} {pager}"}
        opened.append(Terminal(arguments, tmp_path, environment))
        return opened[-1]

    yield run
    for terminal in opened:
        terminal.close()


def test_longer_than_the_screen(on_terminal):
    terminal = on_terminal(8, "ls")
    terminal.wait_for("lines came")
    terminal.type("\x03")  # the pager's, not ours
    terminal.type("enough\n")
    terminal.wait_for("typed: enough")
    assert terminal.wait() == 0


@pytest.mark.parametrize("arguments", [("ls",), ("ls", "--json"), ("ls", "-q")], ids=str)
def test_what_fits_and_what_is_for_programs_is_not_paged(on_terminal, arguments):
    terminal = on_terminal(40 if len(arguments) == 1 else 2, *arguments)
    assert "instruct" in terminal.wait_for("tone")
    assert terminal.wait() == 0
