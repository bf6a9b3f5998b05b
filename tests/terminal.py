"""A command on a terminal of its own, as a person has it: a process behind a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import warm

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][0-9AB]?|\x1b\][^\x07]*\x07")


class Terminal:
    """``stackctl`` with some arguments; what it shows is kept without the terminal's own escape sequences.

    With ``forked`` it is no process from its first line, but one that has torch already.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        environment: Mapping[str, str] | None = None,
        *,
        forked: bool = False,
    ) -> None:
        command = [sys.executable, "-m", "stackctl", *map(str, arguments)]
        settings = {
            **os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PROMPT_TOOLKIT_NO_CPR": "1",
            **(environment or {}),
        }  # fmt: skip
        self._raw = ""
        self._read = 0
        self._command: warm.Command | None = None
        if forked:
            self._master, other = os.openpty()
            name = Path(os.ttyname(other))
            self._command = warm.Command(command[3:], folder, name, name, settings)
            self._pid = self._command.pid
            select.select([self._master], [], [], 120)  # until it shows something, and so has the other end itself
            os.close(other)
            return
        self._pid, self._master = pty.fork()
        if not self._pid:  # the child: nothing but exec, for other threads are not there
            os.chdir(folder)
            os.execve(command[0], command, settings)

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Everything shown since the last call, up to ``text``."""
        end = time.monotonic() + seconds
        while (at := self._raw.find(text, self._read)) < 0:
            if not select.select([self._master], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"{text!r} was not shown:\n{self._raw[self._read :]}")
            try:
                data = os.read(self._master, 65536)
            except OSError:  # how Linux says that the other side is closed
                data = b""
            if not data:
                raise AssertionError(f"it ended before {text!r}:\n{self._raw[self._read :]}")
            self._raw += data.decode(errors="replace")
        found, self._read = self._raw[self._read : at + len(text)], at + len(text)
        return _ESCAPES.sub("", found)

    def wait_for_prompt(self) -> str:
        """What was shown until the line editor reads again, which it tells the terminal."""
        return self.wait_for("\x1b[?2004h")

    def wait_for_answer(self) -> None:
        """The line editor has let go of the terminal, and something came after it."""
        self.wait_for("\x1b[?2004l")
        while len(self._raw) == self._read:
            self._raw += os.read(self._master, 65536).decode(errors="replace")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def wait(self) -> int:
        """The exit code, once the process has ended by itself."""
        while True:
            try:
                if not os.read(self._master, 65536):
                    break
            except OSError:
                break
        pid, self._pid = self._pid, 0
        if self._command:
            return self._command.wait(60)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self.wait()
        os.close(self._master)
