"""bash, as a person has it, completes names inside an expression; what it cut is put together again."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_registry, register
from typer._completion_shared import get_completion_script

from stackctl.cli.completion import VARIABLE, join_words

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\x07")


@pytest.mark.parametrize(
    ("pieces", "current", "words"),
    [
        (["stackctl", "inspect", "st"], 2, ["stackctl", "inspect", "st"]),
        (["stackctl", "compose", "style", ":", "0.7+ins"], 4, ["stackctl", "compose", "0.7+ins"]),
        (["stackctl", "push", "a", "@", "1+b", ":", "2", "me/x"], 7, ["stackctl", "push", "a@1+b:2", "me/x"]),
        (["stackctl", "push", "a", "@", "1+b", ":", "2", "me/x"], 4, ["stackctl", "push", "1+b"]),
        (["stackctl", "train", "x", "--on", "=", "st"], 5, ["stackctl", "train", "x", "--on", "st"]),
        (["stackctl", "train", "x", "--on", "="], 4, ["stackctl", "train", "x", "--on", ""]),
        (["stackctl", "train", "x", "--on", ""], 4, ["stackctl", "train", "x", "--on", ""]),
    ],
)
def test_what_bash_cut_is_put_together(pieces: list[str], current: int, words: list[str]) -> None:
    environment = {VARIABLE: "complete_bash", "COMP_WORDS": "\n".join(pieces), "COMP_CWORD": str(current)}
    join_words(environment)
    assert environment["COMP_WORDS"].split("\n") == words
    assert environment["COMP_CWORD"] == str(len(words) - 1)


def test_other_shells_keep_words_whole() -> None:
    environment = {VARIABLE: "complete_zsh"}
    join_words(environment)
    assert environment == {VARIABLE: "complete_zsh"}


class Bash:
    """An interactive bash with the completion that typer installs."""

    def __init__(self, folder: Path) -> None:
        bash = shutil.which("bash") or "/bin/bash"
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._pid, self._master = pty.fork()
        if not self._pid:
            os.chdir(folder)
            os.execve(bash, [bash, "--norc", "-i"], {**os.environ, "PATH": path, "PS1": "$ ", "TERM": "xterm"})

    def send(self, keys: str, until: str, seconds: float = 30) -> str:
        os.write(self._master, keys.encode())
        shown, end = "", time.monotonic() + seconds
        while until not in shown and time.monotonic() < end:
            if select.select([self._master], [], [], 0.2)[0]:
                shown += _ESCAPES.sub("", os.read(self._master, 65536).decode(errors="replace"))
        assert until in shown, shown
        return shown

    def close(self) -> None:
        os.close(self._master)
        os.waitpid(self._pid, 0)


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[Bash]:
    registry = make_registry(tmp_path / "registry")
    register(registry, "style", seed=1)
    register(registry, "instruct", ["style@1"], seed=2)
    script = get_completion_script(prog_name="stackctl", complete_var=VARIABLE, shell="bash")
    (tmp_path / "completion.sh").write_text(script + "\nbind 'set bell-style none'\n")
    shell = Bash(tmp_path)
    yield shell
    shell.close()


def test_bash_completes_names_inside_an_expression(bash: Any) -> None:
    bash.send("source completion.sh; echo rea''dy\r", "ready")
    for typed, done in (
        ("stackctl inspect inst\t", "inspect instruct "),
        ("stackctl compose style:0.7+ins\t", "0.7+instruct "),
        ("stackctl compose style@1+ins\t", "1+instruct "),
        ("stackctl train x --on=st\t", "style "),
        ("stackctl export style --format gg\t", "--format gguf "),
        ("stackctl base rm ti\t", "base rm tiny "),
    ):
        bash.send(typed, done)
        bash.send("\x15echo nex''t\r", "next")
