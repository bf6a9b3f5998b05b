"""The only printer: who gets what on which stream."""

from __future__ import annotations

import io
import json
import sys

import pytest

from stackctl.core.errors import (
    Failed,
    HubFailure,
    Incompatible,
    Interrupted,
    NotFound,
    StackctlError,
    Usage,
    VerificationFailed,
)
from stackctl.render.output import Output, Result, console, prepare_streams
from stackctl.render.terminal import Painted, printable

RESULT = Result({"name": "灯", "loss": 1.5}, "brief", "screen", notes=("mind this",))
ERRORS = [Failed, Usage, NotFound, Incompatible, VerificationFailed, HubFailure, Interrupted, StackctlError]


def test_a_person_gets_the_screen_and_the_notes(capsys):
    Output().emit(RESULT)
    assert capsys.readouterr() == ("screen\n", "note: mind this\n")


def test_a_program_gets_one_document_that_begins_with_its_schema(capsys):
    Output(json_mode=True).emit(RESULT)
    out, err = capsys.readouterr()
    assert out == '{"schema": 1, "name": "灯", "loss": 1.5}\n'
    assert err == "note: mind this\n"


def test_quiet_prints_the_brief_alone(capsys):
    Output(quiet=True).emit(RESULT)
    assert capsys.readouterr() == ("brief\n", "")
    Output(quiet=True).emit(Result({}, "", "screen"))
    assert capsys.readouterr() == ("", "")


def test_json_wins_over_quiet(capsys):
    Output(json_mode=True, quiet=True).emit(RESULT)
    out, err = capsys.readouterr()
    assert json.loads(out)["name"] == "灯"
    assert err == ""


def test_a_number_that_json_does_not_know_is_never_printed(capsys):
    with pytest.raises(ValueError):
        Output(json_mode=True).emit(Result({"loss": float("nan")}, ""))
    assert capsys.readouterr().out == ""


def test_a_list_of_any_length_is_written_as_it_is_made(capsys):
    seen = []

    def items():
        for number in range(3):
            seen.append(capsys.readouterr().out)
            yield {"n": number}

    Output(json_mode=True).line_json({"rows": items(), "none": iter(()), "last": "灯"})
    assert seen == ['{"schema": 1, "rows": [', '{"n": 0}', ', {"n": 1}']
    assert capsys.readouterr().out == ', {"n": 2}], "none": [], "last": "灯"}\n'


def test_a_document_is_one_line_for_whoever_splits_it(capsys):
    """Python's splitlines cuts at U+0085, U+2028 and U+2029, too, and models write them."""
    text = "a\x85b\u2028c\u2029d\x1ce"
    Output(json_mode=True).emit(Result({"text": text}, ""))
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert json.loads(out)["text"] == text


def test_a_screen_may_be_drawn(capsys):
    from stackctl.render.tables import table

    Output().emit(Result({}, "", lambda: table(["stack", "loss"], [["a[b]c", 1.5], [":smile:", 2]], "title")))
    out = capsys.readouterr().out
    assert "a[b]c" in out
    assert ":smile:" in out


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("hint", [None, "do\n that"])
def test_an_error_is_two_lines_and_with_json_a_document(capsys, kind, hint):
    Output().error(kind("it  is\nwrong", hint=hint))
    out, err = capsys.readouterr()
    assert out == ""
    first, second = err.splitlines()
    assert first == "error: it is wrong"
    assert second.startswith("hint: ")
    assert len(second) > len("hint: ")
    Output(json_mode=True).error(kind("it  is\nwrong", hint=hint))
    out, again = capsys.readouterr()
    assert again == err
    document = json.loads(out)
    assert document["schema"] == 1
    assert document["error"]["code"] == kind.code
    assert document["error"]["message"] == "it  is\nwrong"
    assert document["error"]["hint"]


def test_exit_codes_are_those_of_the_contract():
    assert [kind.exit_code for kind in ERRORS] == [1, 2, 3, 4, 5, 6, 130, 1]
    assert len({kind.code for kind in ERRORS[:-1]}) == 7


@pytest.mark.parametrize("left", ["50%|#####     |", "\r50%", "done\n", "", "done\n\x1b[?25h"])
def test_an_error_starts_a_line_wherever_a_progress_bar_left_the_cursor(monkeypatch, left):
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    prepare_streams()
    sys.stderr.write(left)
    Output().error(Failed("cut", hint="again"))
    shown = written.getvalue().replace("\x1b[?25h", "")
    assert "error: cut" in shown.splitlines()
    assert "\n\n" not in shown


def test_tracking_twice_is_tracking_once(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    prepare_streams()
    tracked = sys.stderr
    prepare_streams()
    assert sys.stderr is tracked


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("no_color", ["1", ""])
def test_no_color_leaves_no_escape_on_a_terminal(monkeypatch, no_color):
    from rich.text import Text

    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Terminal()
    console(screen).print(Text("bold", style="bold red"))
    monkeypatch.setattr(sys, "stderr", screen)
    Output().error(Failed("x", hint="y"))
    assert ("\x1b[" in screen.getvalue()) is not bool(no_color)


def on_terminal(monkeypatch, columns=40):
    """stderr as a terminal of that many columns, with colours."""
    monkeypatch.setenv("NO_COLOR", "")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    return screen


def test_labels_have_colours_whoever_says_them(monkeypatch):
    screen = on_terminal(monkeypatch)
    output = Output()
    output.note("mind this")
    output.status("note: mind that")
    output.status("wrote a note: here")
    output.error(Failed("x", hint="y"))
    assert screen.getvalue().splitlines() == [
        "\x1b[1;33mnote:\x1b[0m mind this",
        "\x1b[1;33mnote:\x1b[0m mind that",
        "wrote a note: here",
        "\x1b[1;31merror:\x1b[0m x",
        "\x1b[1;36mhint:\x1b[0m y",
    ]


def test_a_terminal_breaks_no_word_and_no_command(monkeypatch):
    screen = on_terminal(monkeypatch, columns=20)
    monkeypatch.setenv("NO_COLOR", "1")
    command = "go on with: stackctl train --resume style --data style.jsonl"
    Output().status(f"  these words are many\n{command}\nand\n{'x' * 30}")
    assert screen.getvalue().splitlines() == ["  these words are", "  many", command, "and", "x" * 30]


def test_our_own_colours_reach_the_terminal_and_nobody_elses(monkeypatch):
    screen = on_terminal(monkeypatch)
    Output().status(Painted("\x1b[32mlearned\x1b[0m"))
    Output().status("\x1b[32mnot ours")
    assert screen.getvalue() == "\x1b[32mlearned\x1b[0m\n\\x1b[32mnot ours\n"


@pytest.mark.parametrize("columns", ["", "0", "many"])
def test_what_is_piped_is_not_cut(monkeypatch, columns):
    """With ``COLUMNS=0`` nothing was shown at all."""
    from stackctl.render.tables import table

    monkeypatch.setenv("COLUMNS", columns)
    pipe = io.StringIO()
    console(pipe).print(table(["path"], [["x" * 150]]))
    assert "x" * 150 in pipe.getvalue()
    assert "\x1b" not in pipe.getvalue()


def test_progress_draws_nothing_where_there_is_no_terminal(capsys):
    with Output().progress() as progress:
        progress.advance(progress.add_task("x", total=1))
    assert capsys.readouterr() == ("", "")


HOSTILE = "the voice\x1b]0;owned\x07\x1b[2J\x9b31m\r\x7f\ud800"


def test_what_others_wrote_cannot_speak_to_the_terminal(capsys):
    from rich.text import Text

    from stackctl.render.tables import table

    output = Output()
    screens = (HOSTILE, lambda: table(["name", HOSTILE], [["x", Text(HOSTILE)]]))
    for screen in screens:
        output.emit(Result({}, "", screen, notes=(HOSTILE,)))
    output.status(HOSTILE)
    output.error(Usage(HOSTILE, hint=HOSTILE))
    out, err = capsys.readouterr()
    for said in (out, err):
        assert not {sign for sign in said if not sign.isprintable()} - {"\n"}
        assert r"the voice\x1b]0;owned\x07" in said


def test_what_can_be_shown_is_shown_as_it_is():
    text = "".join(map(chr, (*range(0x20, 0x7F), *range(0xA0, 0x300), 0x4E00, 0x1F642))) + "\n\t"
    assert printable(text) == text


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_a_model_says_is_verbatim_in_a_pipe_alone(capsys, monkeypatch, is_terminal):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    Output().speech("\x1b[2Jno")
    assert capsys.readouterr().out == (r"\x1b[2Jno" if is_terminal else "\x1b[2Jno")


def test_half_a_character_is_written_as_json_writes_it(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    Output(json_mode=True).emit(Result({"path": "a\udcff", "name": "\ud800 灯"}, ""))
    stream.flush()
    assert json.loads(stream.buffer.getvalue()) == {"schema": 1, "path": "a\udcff", "name": "\ud800 灯"}


def test_tables_begin_at_the_margin_an_empty_line_apart_and_end_without_blanks(capsys):
    def screen():
        from stackctl.render.tables import spaced, table

        return spaced([table(["name", "rank"], [["style", 16]]), table(["base"], [["tiny"]], title="bases"), "done"])

    Output().emit(Result({}, "", screen))
    rule = "─" * len("style   rank")
    wanted = ["name    rank", rule, "style     16", "", "bases", "base", "────", "tiny", "", "done"]
    assert capsys.readouterr().out.splitlines() == wanted
