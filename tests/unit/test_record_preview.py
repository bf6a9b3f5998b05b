"""What is learned of a record, shown: in brackets, in colour, and never more than a screen."""

from __future__ import annotations

from stackctl.render.record_preview import render_preview

CHAT = [("user\nHi.\nassistant\n", False), ("Well met.\nFriend.<end>", True), ("\n", False), ("Bye.", True)]


def test_brackets_stand_around_what_is_learned() -> None:
    shown = render_preview(CHAT, colours=False)
    assert shown.split("\n") == [
        "  │ user",
        "  │ Hi.",
        "  │ assistant",
        "  │ ⟦Well met.",
        "  │ Friend.<end>⟧",
        "  │ ⟦Bye.⟧",
    ]


def test_colours_are_closed_on_every_line() -> None:
    lines = render_preview(CHAT, colours=True).split("\n")
    assert lines[3] == "  │ \033[32mWell met.\033[0m"
    assert lines[4] == "  │ \033[32mFriend.<end>\033[0m"
    assert all(line.count("\033[0m") * 2 == line.count("\033[") for line in lines)


def test_what_is_long_is_shown_from_both_ends() -> None:
    shown = render_preview([("a" * 5000 + "z" * 5000, True)] * 100, colours=False)
    assert len(shown) < 4000
    assert shown.startswith("  │ ⟦aaa") and "a … z" in shown and shown.endswith("z⟧ …")


def test_data_does_not_steer_the_terminal() -> None:
    assert render_preview([("\033[2Jgone\r\t", True)], colours=False) == "  │ ⟦\\x1b[2Jgone\\r\\t⟧"
    assert render_preview([("海\u3000面 é", True)], colours=False) == "  │ ⟦海\u3000面 é⟧"


def test_lines_end_between_words_where_the_terminal_ends() -> None:
    parts = [("one two three four", False), (" five six", True)]
    assert render_preview(parts, colours=False, width=15).split("\n") == [
        "  │ one two",
        "  │ three four⟦",
        "  │ five six⟧",
    ]
    assert render_preview([("海面" * 5, True)], colours=True, width=12).split("\n") == [
        "  │ \033[32m海面海面\033[0m",
        "  │ \033[32m海面海面\033[0m",
        "  │ \033[32m海面\033[0m",
    ]
    long = render_preview([("a" * 30, True)], colours=True, width=14)
    assert [line.count("a") for line in long.split("\n")] == [10, 10, 10]
