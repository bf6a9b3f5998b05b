"""What is longer than the screen, and who decides by what it is shown."""

from __future__ import annotations

import itertools
import sys

import pytest

from stackctl.render import terminal

UPPER = "tr a-z A-Z"


@pytest.fixture
def screen(monkeypatch, capfd):
    """stdout as a terminal; the function returns what ``show`` puts on it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("PAGER", raising=False)

    def shown(pieces, height=3, *, piped=False):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: not piped)
        capfd.readouterr()
        terminal.show_paged(pieces, height)
        return capfd.readouterr().out

    return shown


@pytest.mark.parametrize(
    ("pieces", "paged"),
    [([], False), (["a\nb\n"], False), (["a\n", "b\n"], False), (["a\nb\nc\n"], True), (["a\n", "b\n", "c\n"], True)],
    ids=repr,
)
def test_only_what_is_longer_than_the_screen_is_paged(screen, monkeypatch, pieces, paged):
    monkeypatch.setenv("STACKCTL_PAGER", UPPER)
    text = "".join(pieces)
    assert screen(pieces) == (text.upper() if paged else text)


def test_what_is_piped_is_never_paged(screen, monkeypatch):
    monkeypatch.setenv("STACKCTL_PAGER", UPPER)
    assert screen(["a\n"] * 9, piped=True) == "a\n" * 9


@pytest.mark.parametrize(
    ("environment", "paged"),
    [
        ({"PAGER": UPPER}, True),
        ({"STACKCTL_PAGER": UPPER, "PAGER": "no-such-program"}, True),
        ({"STACKCTL_PAGER": "", "PAGER": UPPER}, False),
        ({"STACKCTL_PAGER": "cat", "PAGER": UPPER}, False),
        ({"PAGER": "cat"}, False),
        ({"PAGER": "no-such-program -x"}, False),
        ({"PAGER": UPPER, "TERM": "dumb"}, False),
        ({"PAGER": f"{UPPER} | cat"}, True),
    ],
    ids=str,
)
def test_whose_pager(screen, monkeypatch, environment, paged):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert screen(["a\n"] * 9) == ("A\n" if paged else "a\n") * 9


def test_a_pager_that_nobody_chose(screen, monkeypatch):
    monkeypatch.setattr(terminal.shutil, "which", lambda name: "/usr/bin/more" if name == "more" else None)
    assert terminal._pager() == "more"
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    assert screen(["a\n"] * 9) == "a\n" * 9


def test_how_less_behaves_is_its_users_choice(screen, monkeypatch):
    monkeypatch.setenv("STACKCTL_PAGER", 'sh -c "cat >/dev/null; echo $LESS"')
    monkeypatch.delenv("LESS", raising=False)
    assert screen(["a\n"] * 9) == "FRX\n"
    monkeypatch.setenv("LESS", "S")
    assert screen(["a\n"] * 9) == "S\n"


def test_who_has_seen_enough_leaves(screen, monkeypatch):
    monkeypatch.setenv("STACKCTL_PAGER", "head -n 2")
    asked = 0

    def endless():
        nonlocal asked
        for asked in itertools.count(1):
            yield f"{asked}\n"

    assert screen(endless()) == "1\n2\n"
    assert asked < 1_000_000
