"""Heat maps: where a module stands, and what a terminal of some width shows of it."""

from __future__ import annotations

import math
import re

import pytest

from stackctl.lora.module_grid import GridPlace, arrange, grid_place, short_names
from stackctl.render.heat_map import HeatMap, render_heat_map

LLAMA = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def llama(layers: int) -> list[str]:
    return [f"model.layers.{n}.{kind}" for n in range(layers) for kind in LLAMA]


def heat_map(values: dict[str, float | None], top: float = 1.0, **more: object) -> HeatMap:
    """One module at each place."""
    grids, outside = arrange(values)
    assert len(grids) == 1 and not outside
    numbers = {cell: values[names[0]] for cell, names in grids[0].cells.items()}
    return HeatMap(grids[0], numbers, top, **more)  # type: ignore[arg-type]


def text(heat: HeatMap, width: int, colours: bool = False) -> list[str]:
    lines = ["".join(piece for piece, _ in line) for line in render_heat_map(heat, width, colours=colours)]
    assert all(len(line) <= width for line in lines), lines
    return lines


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.11.self_attn.q_proj", GridPlace("model.layers", 11, "self_attn.q_proj")),
        ("transformer.h.0.attn.c_proj", GridPlace("transformer.h", 0, "attn.c_proj")),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h", GridPlace("gpt_neox.layers", 3, "mlp.dense_4h_to_h")),
        ("model.layers.2.mlp.experts.7.w1", GridPlace("model.layers", 2, "mlp.experts.*.w1")),
        ("3.q_proj", GridPlace("", 3, "q_proj")),
        ("lm_head", GridPlace("", None, "lm_head")),
        ("model.embed_tokens", GridPlace("", None, "model.embed_tokens")),
        ("head.0", GridPlace("", None, "head.0")),
        ("model.layers.².q", GridPlace("", None, "model.layers.².q")),
    ],
)
def test_a_module_has_its_place(module: str, expected: GridPlace) -> None:
    assert grid_place(module) == expected


def test_a_layer_has_a_name() -> None:
    assert grid_place("model.layers.11.mlp.up_proj").name == "model.layers.11"
    assert grid_place("3.q_proj").name == "3"
    assert grid_place("lm_head").name == "lm_head"


def test_kinds_are_told_apart_by_as_few_words_as_do() -> None:
    gpt2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(short_names(gpt2).values()) == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]
    assert short_names(["proj", "attn.proj"]) == {"proj": "proj", "attn.proj": "attn.proj"}


def test_layers_are_sorted_by_number_and_experts_share_a_place() -> None:
    grids, outside = arrange(
        ["m.layers.10.q", "m.layers.2.q", "m.layers.2.e.0.w", "m.layers.2.e.1.w", "vision.layers.0.q", "lm_head"]
    )
    text, vision = grids
    assert (text.block, text.layers, text.kinds) == ("m.layers", (2, 10), ("q", "e.*.w"))
    assert text.cells["e.*.w", 2] == ["m.layers.2.e.0.w", "m.layers.2.e.1.w"]
    assert (vision.block, vision.layers) == ("vision.layers", (0,))
    assert outside == ["lm_head"]


def test_numbers_stand_in_the_cells_where_there_is_room() -> None:
    lines = text(heat_map({"h.0.attn.c_proj": 0.5, "h.1.attn.c_proj": 0.0625, "h.1.mlp.c_fc": 1.0}), 80)
    assert [line.split() for line in lines] == [
        ["layer", "0", "1"], ["c_proj", "0.5", "0.062"], ["c_fc", "1"], ["0", "to", "1"],
    ]  # fmt: skip


def test_bars_are_as_high_as_the_numbers() -> None:
    values = {f"layers.{n}.q_proj": n / 31 for n in range(32)}
    heat = heat_map({**values, "layers.3.k_proj": None}, beside={"all": ["3.2", "-"]})
    axis, q_proj, k_proj, legend = text(heat, 60)
    bars = q_proj.split()[1]
    assert len(bars) == 32
    assert bars[0] == "·" and bars[-1] == "█"
    assert list(bars[1:]) == sorted(bars[1:])
    for n in (8, 16, 24):
        assert "▁▂▃▄▅▆▇█".index(bars[n]) == math.ceil(8 * n / 31) - 1
    assert k_proj.rstrip() == "k_proj    ·" + " " * 28 + "    -"
    assert axis.split() == ["layer", "0", "4", "8", "12", "16", "20", "24", "28", "all"]
    for n in (0, 12, 28):
        assert axis.index(f" {n}") + 1 == len("q_proj ") + n
    assert legend.split() == ["0", "▁▂▃▄▅▆▇█", "1,", "·", "zero"]


@pytest.mark.parametrize("width", [40, 80, 100, 160, 200])
@pytest.mark.parametrize("layers", [1, 2, 28, 32, 80, 126])
@pytest.mark.parametrize("colours", [False, True])
def test_every_width_shows_every_cell_once(width: int, layers: int, colours: bool) -> None:
    heat = heat_map(dict.fromkeys(llama(layers), 0.5), beside={"all": ["0.1", "0.22", "0.333"]})
    lines = render_heat_map(heat, width, colours=colours)
    assert all(len("".join(piece for piece, _ in line)) <= width for line in lines)
    cells = [piece for line in lines for piece, style in line if ("on #" in style if colours else set(piece) == {"▄"})]
    numbers = re.findall(r"\b0\.5\b", "\n".join("".join(piece for piece, _ in line) for line in lines))
    if colours:
        assert len(cells) == 3 * layers + 16  # the scale in the legend has sixteen
    else:
        assert (len(numbers) or len(cells)) == 3 * layers
    assert sum(any("0.333" in piece for piece, _ in line) for line in lines) == 1


def test_colours_go_from_dark_to_bright() -> None:
    line = render_heat_map(heat_map({f"h.{n}.q": n / 2 for n in range(3)}), 12, colours=True)[1]
    assert line[1:] == [("··", ""), ("  ", "#ffffff on #21918c"), ("  ", "#000000 on #fde725")]


def test_an_opposed_layer_is_a_digit_without_colours_and_red_with_them() -> None:
    cosines = {"h.0.q": -0.2, "h.1.q": -0.001, "h.2.q": 0.0, "h.3.q": 0.1, "h.4.q": None, "h.5.q": -0.1}
    heat = heat_map(cosines, top=0.2, signed=True)
    assert "".join(piece for piece, _ in render_heat_map(heat, 16, colours=False)[1]).split() == ["q", "9··+·4"]
    styles = [style for _, style in render_heat_map(heat, 16, colours=True)[1][1:]]
    assert styles[0] == "#ffffff on #d73027"
    assert styles[4] == ""
    assert styles[3] == "#000000 on #5aa0d2"


def test_a_map_of_noughts_and_long_names_fit() -> None:
    lines = text(heat_map({f"layers.{n}.{'very_' * 12}long": 0.0 for n in range(40)}, top=0.0), 80)
    assert lines[1].split()[0].startswith("…")
    assert lines[1].endswith("·" * 40)
    assert "zero everywhere" in lines[-1]
