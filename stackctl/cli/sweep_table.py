"""What ``compose --sweep`` found, on the terminal and as a page. No tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl.cli.sweep_weights import Swept
from stackctl.core.expressions import format_weight
from stackctl.lora.module_grid import Cell, Grid
from stackctl.render.heat_map import Axes, HeatMap

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stackctl.render.page_plots import Plot

_BAR = 24
_EIGHTHS = " ▏▎▍▌▋▊▉"


def best_sentence(swept: Swept) -> str:
    """The best point in words."""
    return f"best: {_weights(swept, swept.best)}, loss {_loss(swept.best)}" + (
        " on the mean of the data sets" if len(swept.data) > 1 else ""
    )


def sweep_screen(swept: Swept) -> RenderableType:
    """A table with bars for one axis, a heat map for two, for each data set; what cannot be improved; the best."""
    from rich.text import Text

    from stackctl.render.tables import HeatMapDrawing, spaced, table

    parts: list[RenderableType] = []
    for source in _sources(swept):
        rows = swept.of(source)
        if len(swept.axes) == 1:
            parts.append(table(*_bars(swept, rows), title=source if len(swept.data) > 1 else None))
        else:
            parts += [Text(_map_title(rows, source), style="bold"), HeatMapDrawing(_heat(swept, rows))]
    if swept.trade_off:
        columns, cells = _trade_off(swept)
        parts.append(table(columns, cells, title="cannot be improved on one without losing on another"))
    parts.append(Text(best_sentence(swept)))
    return spaced(parts)


def sweep_page(swept: Swept, title: str, base: str, method: str) -> str:
    """The whole page: the plots, the trade-off, all points."""
    from stackctl.render.html import render_page

    finite = [row for row in swept.rows if row["loss"] is not None]
    lowest = {source: min(row["loss"] for row in finite if row["data"] == source) for source in _sources(swept)}
    best = {(n, "loss") for n, row in enumerate(swept.rows) if row["loss"] == lowest[row["data"]]}
    columns, cells = _trade_off(swept)
    return render_page(
        "sweep.html",
        title=title,
        said=best_sentence(swept),
        notes=swept.notes,
        drawings=_drawings(swept),
        trade_off={"columns": columns, "rows": cells, "drawing": _front(swept)} if swept.trade_off else None,
        columns=["weights", "data", "loss", "±", "p against the best"],
        rows=[[_weights(swept, row), _short(row["data"]), *_numbers(row)] for row in swept.rows],
        best=best,
        settings=[("base", base), ("method", method), ("weights that are fixed", _fixed(swept)),
                  *(("measured on", _short(source)) for source in swept.data)],
    )  # fmt: skip


def _sources(swept: Swept) -> list[str]:
    return [*swept.data, *([swept.judged] if len(swept.data) > 1 else [])]


def _short(source: str) -> str:
    """A data set by its file's name: a page is sent around."""
    return Path(source).name or source


def _place(swept: Swept, row: dict[str, Any]) -> list[float]:
    """A point's weights on the axes."""
    return [row["weights"][name] for name in _names(swept)]


def _names(swept: Swept) -> list[str]:
    """The members that the axes are of, by name: an axis may have been typed with a version."""
    labels = {
        key: member.adapter.name
        for member in swept.planned.stack.members
        for key in (member.adapter.name, member.label)
    }
    return [labels[axis.name] for axis in swept.axes]


def _weights(swept: Swept, row: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {format_weight(w)}" for name, w in zip(_names(swept), _place(swept, row), strict=True)
    )  # fmt: skip


def _fixed(swept: Swept) -> str:
    tried = set(_names(swept))
    fixed = {n: w for n, w in swept.best["weights"].items() if n not in tried}
    return ", ".join(f"{n} {'by layer' if isinstance(w, dict) else format_weight(w)}" for n, w in fixed.items()) or "-"


def _loss(row: dict[str, Any]) -> str:
    error = row["standard_error"]
    return f"{row['loss']:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _numbers(row: dict[str, Any]) -> list[str]:
    loss, error, chance = row["loss"], row["standard_error"], row["p_value"]
    return [
        "not finite" if loss is None else f"{loss:.4f}",
        "" if error is None else f"{error:.4f}",
        "" if chance is None else "< 0.001" if chance < 0.001 else f"{chance:.2g}",
    ]


# -- on a terminal -----------------------------------------------------------------------------------------------------


def _bars(swept: Swept, rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    """A line for each point, with a bar as long as its loss is above the lowest."""
    from rich.text import Text

    from stackctl.render.tables import marked

    known = [row["loss"] for row in rows if row["loss"] is not None]
    low, high = min(known), max(known)
    lines: list[list[object]] = []
    for row in rows:
        loss, error, chance = _numbers(row)
        is_best = row["loss"] == low
        share = 1.0 if row["loss"] is None else (row["loss"] - low) / (high - low) if high > low else 0.0
        bar = Text("?" if row["loss"] is None else _bar(share), "green" if is_best else "")
        lines.append([format_weight(_place(swept, row)[0]), marked(loss, is_best), error, chance, bar])
    return [f"weight of {_names(swept)[0]}", "loss ", "±", "p", "above the lowest"], lines


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _map_title(rows: Sequence[dict[str, Any]], source: str) -> str:
    lowest = min((row for row in rows if row["loss"] is not None), key=lambda row: row["loss"])
    return f"loss on {source} above the lowest, {_loss(lowest)}"


def _heat(swept: Swept, rows: Sequence[dict[str, Any]]) -> HeatMap:
    """The second axis across, the first one down."""
    down, across = swept.axes
    lowest = min(row["loss"] for row in rows if row["loss"] is not None)
    names = _names(swept)
    kinds = {value: f"{names[0]} {format_weight(value)}" for value in down.values}
    values: dict[Cell, float | None] = {}
    cells: dict[Cell, list[str]] = {}
    for row in rows:
        first, second = _place(swept, row)
        cell = kinds[first], across.values.index(second)
        values[cell] = math.nan if row["loss"] is None else row["loss"] - lowest
        cells[cell] = [_weights(swept, row)]
    columns = {n: format_weight(value) for n, value in enumerate(across.values)}
    top = max(value for value in values.values() if value is not None and not math.isnan(value))
    grid = Grid("", tuple(columns), tuple(kinds.values()), cells)
    return HeatMap(grid, values, top, names=Axes(f"{names[1]} →", columns, {kind: kind for kind in kinds.values()}))


def _trade_off(swept: Swept) -> tuple[list[str], list[list[str]]]:
    rows = [
        [_weights(swept, point), *(f"{loss:.4f}" for loss in point["losses"].values())] for point in swept.trade_off
    ]
    return ["weights", *map(_short, swept.data)], rows


# -- on a page ---------------------------------------------------------------------------------------------------------


def _drawings(swept: Swept) -> list[Plot]:
    from stackctl.render.page_plots import Point, curve_plot, heat_plot

    if len(swept.axes) == 2:
        return [
            heat_plot(_map_title(swept.of(source), _short(source)), _heat(swept, swept.of(source)))
            for source in _sources(swept)
        ]
    series = {
        _short(source): [
            Point(
                _place(swept, row)[0],
                row["loss"],
                f"{_weights(swept, row)}: {_loss(row)}",
                row["standard_error"] or 0.0,
            )
            for row in swept.of(source)
            if row["loss"] is not None
        ]
        for source in _sources(swept)
    }
    name = _names(swept)[0]
    best = Point(_place(swept, swept.best)[0], swept.best["loss"], best_sentence(swept))
    return [curve_plot(f"loss by the weight of {name}", f"weight of {name}", "loss", series, {"best": [best]})]


def _front(swept: Swept) -> Plot | None:
    """The losses on two data sets against one another; there is no such plane for three."""
    from stackctl.render.page_plots import Point, curve_plot

    if len(swept.data) != 2:
        return None
    one, other = swept.data
    pairs = zip(swept.of(one), swept.of(other), strict=True)

    def point(losses: tuple[float, float], row: dict[str, Any]) -> Point:
        return Point(*losses, f"{_weights(swept, row)}: {losses[0]:.4f}, {losses[1]:.4f}")

    every = [point((a["loss"], b["loss"]), a) for a, b in pairs if a["loss"] is not None and b["loss"] is not None]
    front = [point((row["losses"][one], row["losses"][other]), row) for row in swept.trade_off]
    best = [p for p, row in zip(front, swept.trade_off, strict=True) if row["weights"] == swept.best["weights"]]
    title = f"loss on {_short(other)} against loss on {_short(one)}"
    return curve_plot(
        title, f"loss on {_short(one)}", f"loss on {_short(other)}", {"cannot be improved": front},
        {"other": every, "best": best},
    )  # fmt: skip
