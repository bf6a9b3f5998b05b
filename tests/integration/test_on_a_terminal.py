"""What a run shows where somebody looks: colours that are colours, and what Ctrl-C does to a step."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal
from tiny_registry import CHAT


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Any]:
    """A command on a terminal of 60 columns, with colours."""
    opened: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(arguments, tmp_path, {"NO_COLOR": "", "COLUMNS": "60", "LANG": "C.UTF-8"}))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


def test_one_ctrl_c_ends_the_step_and_says_how_to_go_on(h: Any, watched: Any) -> None:
    """The preview is coloured, the key is answered at once, and what is typed again is what the hint says."""
    data = h.data(CHAT * 8)
    words = ["train", "new", "--data", data, "--rank", 2, "--max-steps", 60]
    run = watched(*words)
    shown = run.wait_for("training new")
    assert "what is learned of the first record is green" in " ".join(shown.split())
    assert "Well met, friend." in shown
    assert "\\x1b" not in shown
    run.type("\x03")
    said = run.wait_for("hint:")
    hint = run.wait_for("\n")
    assert run.wait() == 130
    assert said.count("it ends after this step and is saved") == 1
    assert "Traceback" not in said
    assert "it was saved" in said
    assert hint.strip() == f"go on with: {sys.executable} -m stackctl train --resume {' '.join(map(str, words[1:]))}"
    (unfinished,) = h.run("ls", "--json").json["runs"]
    assert 0 < unfinished["step"] < 60
    again = h.run(*words, "--resume", "--json")
    assert again.json["steps"] == 60
    assert f"going on after step {unfinished['step']}" in again.err
