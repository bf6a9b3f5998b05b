"""Plots as places and sizes: where numbers land."""

from __future__ import annotations

import pytest

from stackctl.lora.module_grid import arrange
from stackctl.render.heat_map import HeatMap
from stackctl.render.page_plots import Plot, heat_plot, line_plot, matrix_plot, tree_plot


def heat_map(values: dict[str, float | None], top: float, **more: object) -> HeatMap:
    (grid,), _ = arrange(values)
    return HeatMap(grid, {cell: values[names[0]] for cell, names in grid.cells.items()}, top, **more)  # type: ignore[arg-type]


def inside(plot: Plot) -> None:
    """Nothing lies outside of the picture; of texts only the beginning, or the end, is known for sure."""
    for box in plot.boxes:
        assert box.x >= 0 and box.x + box.width <= plot.width
        assert box.y >= 0 and box.y + box.height <= plot.height
        assert 0 <= box.opacity <= 1
    for label in plot.labels:
        assert 0 <= label.x <= plot.width and 0 <= label.y <= plot.height
    for line in plot.lines:
        for x, y in (point.split(",") for point in line.points.split()):
            assert 0 <= float(x) <= plot.width and 0 <= float(y) <= plot.height


@pytest.mark.parametrize("layers", [1, 2, 32, 126])
def test_each_cell_of_a_map_is_a_box_with_its_number(layers: int) -> None:
    values = {f"h.{n}.{kind}": n / layers for n in range(layers) for kind in ("attn.c_proj", "mlp.c_proj")}
    plot = heat_plot("map", heat_map(values, 1.0, beside={"all": ["1.5", "2.5"]}))
    inside(plot)
    titled = {box.title: box for box in plot.boxes if box.title}
    assert set(titled) == {f"{module}: {format(value, '.3g')}" for module, value in values.items()}
    assert [box.look for box in titled.values()].count("zero") == 2  # layer 0
    last = titled[f"h.{layers - 1}.mlp.c_proj: {(layers - 1) / layers:.3g}"]
    assert last.opacity == (pytest.approx((layers - 1) / layers, abs=1e-3) if layers > 1 else 0)
    assert {"attn.c_proj", "mlp.c_proj", "all", "1.5", "2.5"} <= {label.text for label in plot.labels}


def test_a_signed_map_has_two_colours() -> None:
    plot = heat_plot("map", heat_map({"h.0.q": -0.2, "h.1.q": 0.1, "h.2.q": None, "h.3.q": 0.0}, 0.2, signed=True))
    found = [(box.look, box.opacity) for box in plot.boxes if box.title]
    assert found == [("opposed", 1.0), ("aligned", 0.5), ("zero", 0.0), ("aligned", 0.0)]


def test_a_matrix_is_symmetric_and_has_no_diagonal() -> None:
    plot = matrix_plot("cosines", ["style@1", "instruct@1", "tone@1"], {(0, 1): -0.5, (0, 2): 0.25, (1, 2): None}, 0.5)
    inside(plot)
    assert sorted((box.look, box.title) for box in plot.boxes) == [
        ("aligned", "style@1 and tone@1: +0.250"), ("aligned", "tone@1 and style@1: +0.250"),
        ("opposed", "instruct@1 and style@1: -0.500"), ("opposed", "style@1 and instruct@1: -0.500"),
        ("zero", "instruct@1 and tone@1: -"), ("zero", "tone@1 and instruct@1: -"),
    ]  # fmt: skip
    first, second = plot.boxes[0], plot.boxes[1]
    assert (first.x - second.x) > 0 > (first.y - second.y)


def test_lines_break_at_gaps_and_higher_is_higher() -> None:
    points = [(0, 0.1), (1, 0.3), (2, None), (3, -0.2)]
    plot = line_plot("lines", {"a × b": points, "c × d": [(0, None)]}, least=0.05)
    inside(plot)
    drawn = [line for line in plot.lines if line.look == "s0"]
    assert [len(line.points.split()) for line in drawn] == [2, 1]
    dots = {box.title.rpartition(" ")[2]: box for box in plot.boxes}
    assert dots["0.3"].y < dots["0.1"].y < dots["-0.2"].y
    (axis,) = [line for line in plot.lines if line.look == "grid axis"]
    assert dots["0.1"].y < float(axis.points.split(",")[-1]) < dots["-0.2"].y
    assert [label.text for label in plot.labels if label.look.startswith("s")] == ["a × b", "c × d"]


def test_a_line_of_one_layer_and_of_noughts_is_drawn() -> None:
    inside(line_plot("lines", {"a": [(7, 0.0)]}, least=0.05))


def test_a_tree_joins_each_node_with_the_one_above_it() -> None:
    nodes = [
        (0, "tiny", "base", "root"),
        (1, "a@1", "", "member"),
        (2, "b@1", "x" * 300, ""),
        (1, "c@1", "", "removed"),
    ]
    plot = tree_plot("tree", nodes)
    inside(plot)
    assert [box.look for box in plot.boxes] == ["node root", "node member", "node ", "node removed"]
    assert [box.x for box in plot.boxes] == [0, 26, 52, 26]
    starts = [line.points.split(",")[1].split()[0] for line in plot.lines]
    assert starts == [str(plot.boxes[0].y + 26), str(plot.boxes[1].y + 26), str(plot.boxes[0].y + 26)]
    assert all(len(label.text) < 120 for label in plot.labels)
