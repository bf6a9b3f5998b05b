"""The loss curve: read from a log, drawn as SVG and in characters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stackctl.render.loss_curve import Curve, parse_curve, read_curve, render_curve, render_curve_svg, thinned

NUMBERS = st.sampled_from([0.0, 1.0, -5.0, 1e308, -1e308, 5e-324, 2**70, 1e15]) | st.floats() | st.integers()
SVG = "{http://www.w3.org/2000/svg}"
FALLING = tuple((float(step), 4.0 - step / 50) for step in range(1, 101))


def points(picture: str | None, index: int = 0) -> list[tuple[float, float]]:
    assert picture is not None
    line = ElementTree.fromstring(picture).findall(f"{SVG}polyline")[index]
    return [tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()]  # type: ignore[misc]


def test_a_log_holds_steps_and_looks_and_what_is_neither_is_passed_over() -> None:
    log = (
        '{"step": 0, "eval_loss": 5}\n{"step": 1, "loss": 4}\nnot json\n{"step": 2}\n[1]\n'
        '{"step": 3, "loss": 2.0}\n{"step": 3, "eval_loss": 3.5}\n{"step": 5, "loss": NaN}'
    )
    assert parse_curve(log) == Curve(((1.0, 4.0), (3.0, 2.0)), ((0.0, 5.0), (3.0, 3.5)))
    assert not parse_curve("") and not parse_curve('{"step": "x", "loss": 1}')


def test_the_curve_falls_where_the_loss_falls() -> None:
    curve = Curve(((1.0, 4.0), (3.0, 2.0)), ((0.0, 4.0), (3.0, 3.0)))
    picture = render_curve_svg({"style@1": curve})
    (x1, y1), (x2, y2) = points(picture)
    assert x2 > x1 and y2 > y1  # down on a picture is a larger y
    assert y2 - y1 == pytest.approx((300 - 40 - 36) / 2, abs=0.2)  # half of the height between 0 and 4
    held_out = points(picture, 1)
    assert [x for x, _ in held_out] == [56.0, x2]
    assert held_out[0][1] == y1 and held_out[1][1] == pytest.approx((y1 + y2) / 2, abs=0.1)
    assert picture is not None and "style@1 held-out: 3" in picture and picture.count("stroke-dasharray") == 1


def test_a_long_run_is_a_small_picture_and_names_are_escaped() -> None:
    long = Curve(tuple((float(step), 3.0 + 1 / (step + 1)) for step in range(50_000)))
    picture = render_curve_svg({"a<b": long, "b": Curve(((1.0, 2.0),))})
    assert picture is not None and len(picture) < 12_000 and "a&lt;b" in picture
    assert len(points(picture)) == 240


STRANGE = [
    ((1.0, 0.0),), ((0.0, 0.0), (0.0, 0.0)), ((1.0, -3.0), (2.0, -1.0)), ((1.0, 1e9),), ((5.0, 2.0), (9.0, 2.0)),
]  # fmt: skip


@pytest.mark.parametrize("strange", STRANGE)
def test_strange_curves_are_drawn_inside_the_picture(strange: tuple[tuple[float, float], ...]) -> None:
    assert all(0 <= x <= 640 and 0 <= y <= 300 for x, y in points(render_curve_svg({"a": Curve(strange)})))
    for curve in (Curve(strange), Curve((), strange), Curve(strange, strange)):
        lines = render_curve(curve, 40, 5)
        assert all(len(line) <= 40 for line in lines[:7])
        assert len(lines) == 5 + 2 + bool(curve.training) + bool(curve.held_out)


def test_no_curve_is_no_picture() -> None:
    assert render_curve_svg({"a": Curve()}) is None
    assert render_curve(Curve()) == []


def dots(lines: list[str]) -> list[tuple[int, int]]:
    """Every braille dot of a plot as (column, row) in dots, found from the characters' own numbering."""
    order = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))  # dots 1 to 8 of Unicode
    start = lines[0].index("┤") + 1
    return sorted(
        (2 * column + x, 4 * row + y)
        for row, line in enumerate(lines)
        if "┤" in line
        for column, sign in enumerate(line[start:])
        if 0x2800 < ord(sign) <= 0x28FF
        for bit, (x, y) in enumerate(order)
        if ord(sign) - 0x2800 >> bit & 1
    )


@pytest.mark.parametrize("width", [20, 80, 200])
def test_the_characters_fall_from_corner_to_corner(width: int) -> None:
    lines = render_curve(Curve(FALLING), width, 8)
    assert max(map(len, lines[:-1])) <= width
    found = dots(lines)
    columns = width - len("3.98") - 3
    assert found[-1] == (2 * columns - 1, 31), "the last step is the lowest, in the last corner"
    assert found[0][1] == 0
    tops = [min(y for x, y in found if x == column) for column in sorted({x for x, _ in found})]
    assert tops == sorted(tops), "a loss that only falls is drawn as one"
    assert {y for _, y in found} == set(range(32)), "no gap, however steep"
    assert lines[0].startswith("3.98") and lines[7].lstrip().startswith("2 ")
    assert "step 100" in lines[-2] and "3.980 -> 2.000" in lines[-1]


def test_held_out_losses_are_rings_above_the_line() -> None:
    lines = render_curve(Curve(FALLING, ((0.0, 4.0), (50.0, 3.5), (100.0, 3.75))), 80, 9)
    plot = [line[line.index("┤") + 1 :] for line in lines[:9]]
    assert [(row, line.index("o")) for row, line in enumerate(plot) if "o" in line] == [(0, 0), (1, 75), (2, 38)]
    assert "o held-out loss 4.000 -> 3.750, lowest 3.500" in lines[-1]


def test_thinning_keeps_the_mean() -> None:
    few = thinned(FALLING, 10)
    assert few[0] == (5.5, pytest.approx(3.89))
    assert sum(loss for _, loss in few) / 10 == pytest.approx(sum(loss for _, loss in FALLING) / 100)
    assert json.dumps(thinned(FALLING, 500)) == json.dumps(FALLING)


def test_a_log_may_hold_anything(tmp_path: Path) -> None:
    odd = ["{", "5", "[]", '{"step": 1}', '{"step": 1' + "0" * 400 + ', "loss": 1}', "[" * 100_000]
    (tmp_path / "training_log.jsonl").write_text("\n".join([*odd, '{"step": 2, "loss": 3}']))
    assert read_curve(tmp_path) == Curve(((2.0, 3.0),))
    (tmp_path / "training_log.jsonl").unlink()
    os.mkfifo(tmp_path / "training_log.jsonl")
    assert not read_curve(tmp_path)


@given(st.lists(st.tuples(NUMBERS, st.sampled_from(["loss", "eval_loss"]), NUMBERS), min_size=1, max_size=5))
def test_whatever_was_logged_can_be_drawn(rows: list[tuple[float, str, float]]) -> None:
    curve = parse_curve("\n".join(json.dumps({"step": step, key: loss}) for step, key, loss in rows))
    assert bool(render_curve(curve, 80, 8)) == bool(curve) == (render_curve_svg({"x": curve}) is not None)
