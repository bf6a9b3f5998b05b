"""A listing of any length looks as rich's table does, and never tears the screen."""

from __future__ import annotations

import io
import itertools

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from stackctl.render.tables import StreamedTable, table

COLUMNS = ["  stack", "base", "rank", "trained on"]
WORDS = st.text(st.sampled_from("abz-_.@:+019灯ü "), max_size=12).map(str.strip)


def drawn(what, width, **modes):
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False, emoji=False, **modes)
    console.print(what, crop=False)
    return console.file.getvalue()


@given(st.lists(st.tuples(*[WORDS] * len(COLUMNS)), max_size=5))
def test_what_fits_is_drawn_as_rich_would(rows):
    for modes in ({}, {"force_terminal": True, "color_system": "truecolor"}):
        expected = drawn(table(COLUMNS, rows), 200, **modes)
        assert drawn(StreamedTable(COLUMNS, lambda: rows), 200, **modes).replace("\x1b[1m", "").replace(
            "\x1b[0m", ""
        ) == expected.replace("\x1b[1m", "").replace("\x1b[0m", "")


@given(st.lists(st.tuples(*[WORDS] * len(COLUMNS)), min_size=1, max_size=4), st.integers(24, 60))
def test_what_does_not_fit_is_broken_and_whole(rows, width):
    lines = drawn(StreamedTable(COLUMNS, lambda: rows), width).splitlines()
    assert max(map(cell_len, lines)) <= width
    body = "".join(lines)
    for row in rows:
        for cell in row:
            assert all(body.count(character) >= cell.count(character) for character in set(cell) - {" "})


def test_the_widest_column_gives_way_first():
    text = drawn(StreamedTable(["adapter", "rank", "trained on"], lambda: [["style@1", "16", "x" * 40]]), 40)
    assert "style@1" in text
    assert [line.strip() for line in text.splitlines() if "x" in line] == [
        "style@1     16   " + "x" * 23,
        "x" * 17,
    ]


def test_it_is_drawn_while_rows_still_come():
    asked = []

    def rows():
        for number in range(1000):
            asked.append(number)
            yield [str(number)]

    console = Console(file=io.StringIO(), width=80)
    segments = iter(console.render(StreamedTable(["n"], rows)))
    list(itertools.islice(segments, 10))
    assert asked[:1000] == list(range(1000)), "once to measure"
    assert len(asked) < 1000 + 10 * 20 + 20


def test_no_cell_breaks_its_line_or_speaks_to_the_terminal():
    text = drawn(StreamedTable(["base"], lambda: [["a\nb\x1b[31mc\r\td\u202ee"]]), 80)
    assert len(text.splitlines()) == 3
    assert text.splitlines()[2].strip() == "a\ufffdb\ufffd[31mc\ufffd\ufffdd\ufffde"
