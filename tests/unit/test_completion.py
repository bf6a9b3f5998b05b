"""Shells, as a person has them, complete names and versions inside an expression, values behind ``=``, and files."""

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

from stackctl.cli.completion import VARIABLE, ask_bash, ask_fish, ask_zsh, completing

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>()][0-9AB]?|\x1b\][^\x07]*\x07|\r|\x07")


@pytest.mark.parametrize(
    ("pieces", "current", "words", "offered", "kept"),
    [
        (["stackctl", "inspect", "st"], 2, ["stackctl", "inspect", "st"], "style", "style"),
        (["stackctl", "inspect", "a", "@"], 3, ["stackctl", "inspect", "a@"], "a@2\na@1\n", "@2\n@1\n"),
        (
            ["stackctl", "compose", "style", ":", "0.7+ins"], 4,
            ["stackctl", "compose", "style:0.7+ins"], "style:0.7+instruct", "0.7+instruct",
        ),
        (
            ["stackctl", "push", "a", "@", "1+b", ":", "2", "me/x"], 7,
            ["stackctl", "push", "a@1+b:2", "me/x"], "me/x", "me/x",
        ),
        (["stackctl", "push", "a", "@", "1+b", ":", "2", "me/x"], 4, ["stackctl", "push", "a@1+b"], "a@1+b", "@1+b"),
        (
            ["stackctl", "train", "x", "--on", "=", "st"], 5,
            ["stackctl", "train", "x", "--on", "st"], "style", "style",
        ),
        (
            ["stackctl", "train", "x", "--on", "=", "style", ":", "0.7+i"], 7,
            ["stackctl", "train", "x", "--on", "style:0.7+i"], "style:0.7+i2", "0.7+i2",
        ),
        (["stackctl", "train", "x", "--on", "="], 4, ["stackctl", "train", "x", "--on", ""], "a", "a"),
        (["stackctl", "train", "x", "--on", ""], 4, ["stackctl", "train", "x", "--on", ""], "a", "a"),
    ],
)  # fmt: skip
def test_what_bash_cut_is_put_together(
    pieces: list[str], current: int, words: list[str], offered: str, kept: str
) -> None:
    environment = {VARIABLE: "complete_bash", "COMP_WORDS": "\n".join(pieces), "COMP_CWORD": str(current)}
    answer = ask_bash(environment)
    assert answer is not None
    assert environment["COMP_WORDS"].split("\n") == words
    assert environment["COMP_CWORD"] == str(len(words) - 1)
    assert answer(offered) == kept


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("stackctl train x --on=st", "stackctl train x --on st"),
        ("stackctl train x --on=", "stackctl train x --on "),
        ("stackctl train x --on=style:0.7+i", "stackctl train x --on style:0.7+i"),
    ],
)
def test_an_option_is_parted_from_its_value(line: str, asked: str) -> None:
    for ask, said in ((ask_zsh, "compset -P 1 '*='; a\nb\n"), (ask_fish, "--on=a\n--on=b\n")):
        environment = {"_TYPER_COMPLETE_ARGS": line}
        answer = ask(environment)
        assert answer is not None
        assert environment["_TYPER_COMPLETE_ARGS"] == asked
        assert answer("a\nb\n") == said


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize("line", ["stackctl train x --on st", "stackctl train --on=style ", "stackctl tr", ""])
def test_other_lines_stay_as_they_are(shell: str, line: str, capsys: Any) -> None:
    environment = {VARIABLE: f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    with completing(environment):
        print("said")
    assert environment == {VARIABLE: f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    assert capsys.readouterr().out == "said\n"


class Shell:
    """An interactive shell with the completion that typer installs."""

    def __init__(self, name: str, folder: Path) -> None:
        program, options, begin = SHELLS[name]
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {
            **os.environ, "PATH": path, "PS1": "$ ", "TERM": "xterm", "HOME": str(folder), "COLUMNS": "100",
            "LINES": "40",
        }  # fmt: skip
        script = get_completion_script(prog_name="stackctl", complete_var=VARIABLE, shell=name)
        (folder / "completion").write_text(f"{begin}\n{script}\n")
        self._pid, self._master = pty.fork()
        if not self._pid:
            os.chdir(folder)
            os.execve(program, [program, *options], environment)

    def send(self, keys: str, until: str, seconds: float = 60) -> str:
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


SHELLS = {
    name: (program, options, begin)
    for name, options, begin in (
        ("bash", ["--norc", "-i"], "bind 'set bell-style none'"),
        ("zsh", ["-f", "-i"], "autoload -U compinit; compinit -u -D; unsetopt ZLE_RPROMPT_INDENT BEEP"),
        ("fish", ["--no-config", "-i"], "function fish_prompt; echo '$ '; end"),
    )
    if (program := shutil.which(name))
}
"""Those of this machine; bash is on every one that tests run on."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    registry = make_registry(tmp_path / "registry")
    register(registry, "style", seed=1)
    register(registry, "style", seed=3)
    register(registry, "instruct", ["style@1"], seed=2)
    (tmp_path / "harbour.jsonl").touch()
    return tmp_path


@pytest.fixture(params=SHELLS)
def shell(request: Any, folder: Path) -> Iterator[Shell]:
    shell = Shell(request.param, folder)
    yield shell
    shell.close()


def test_there_is_a_shell() -> None:
    assert "bash" in SHELLS


def test_a_shell_completes_what_one_types(shell: Any) -> None:
    shell.send("source completion; echo rea''dy\r", "ready")
    for typed, done in (
        ("inspect inst", "inspect instruct"),
        ("compose style:0.7+ins", "compose style:0.7+instruct"),
        ("compose style@1+ins", "compose style@1+instruct"),
        ("inspect instruct@", "inspect instruct@1"),
        ("compose style:0.7+instruct@", "compose style:0.7+instruct@1"),
        ("train x --on=st", "train x --on=style"),
        ("export style --format gg", "export style --format gguf"),
        ("base rm ti", "base rm tiny"),
        ("train x --data har", "train x --data harbour.jsonl"),
        ("train x --config har", "train x --config harbour.jsonl"),
        ("generate style --prompts=har", "generate style --prompts=harbour.jsonl"),
        ("add x har", "add x harbour.jsonl"),
    ):
        shell.send(f"stackctl {typed}\t\x01echo do''ne \r", f"done stackctl {done}")
