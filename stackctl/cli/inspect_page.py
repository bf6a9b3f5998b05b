"""The page of ``stackctl inspect --output``: what an adapter or a stack is, as plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stackctl.cli.inspect_maps import Picture, cosine_pictures, figures, norm_pictures
from stackctl.cli.inspect_screen import adapter_facts
from stackctl.core.expressions import format_weight
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.lineage import LineageNode, relatives, tree_lines
from stackctl.render.html import render_page
from stackctl.render.loss_curve import Curve, render_curve_svg
from stackctl.render.page_plots import SERIES, Plot, heat_plot, line_plot, matrix_plot, tree_plot
from stackctl.render.terminal import signed
from stackctl.storage.files import human_bytes

if TYPE_CHECKING:
    from stackctl.engine.overlaps import Interference, PairOverlap

_MOST_MAPS = 10
"""Pairs whose maps are drawn, those with the lowest cosines first."""
_MOST_VERSIONS = 200
"""Lines of the tree; a style may have thousands of descendants."""


def inspection_page(
    info: Mapping[str, Any],
    plan: StackPlan,
    norms: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Curve],
    interference: Interference | None,
    lineage: Sequence[LineageNode],
) -> str:
    """The whole page.

    Args:
        info: what ``inspect`` tells as JSON.
        norms: the rows of ``--weights``.
        curves: the losses of each member, by label.
        lineage: every version of the registry; empty for a checkpoint that is not registered.
    """
    title, facts = _head(info)
    drawn = {label: curve for label, curve in curves.items() if curve}
    return render_page(
        "inspect.html",
        title=title,
        facts=[(name, str(value)) for name, value in facts.items() if value not in (None, "", [], {})],
        problems=info["problems"],
        members=_members(plan) if len(plan.members) > 1 else None,
        norms=[_plots(picture) for picture in norm_pictures(norms)],
        tree=_tree(lineage, [member.label for member in plan.members]),
        curves=render_curve_svg(drawn),
        interference=_interference(interference) if interference else None,
    )


def _head(info: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A page's title, and the facts under it. A page is sent around: it says nothing of where files lie."""
    if info["kind"] == "adapter":
        facts = adapter_facts(info)
        if data := info.get("data"):
            facts["data"] = f"{Path(data['path']).name}, {data['records']} {data['format']} records"
        title = f"adapter {info['adapter']}@{info['version']}"
    elif info["kind"] == "checkpoint":
        facts = {name: info[name] for name in ("base", "digest", "dtype", "parameters", "rank", "modules")}
        title = f"checkpoint {Path(info['path']).name}"
    else:
        facts = {name: info[name] for name in ("expression", "base", "method", "rank", "modules")}
        facts["exact"] = "yes" if info["exact"] else "no"
        title = f"{info['kind']} {info['stack']}"
    if "parameters" in facts:
        facts["parameters"] = f"{facts['parameters']:,}"
    return title, {name: value for name, value in facts.items() if name != "path"}


def _members(plan: StackPlan) -> tuple[list[str], list[list[str]]]:
    rows = [
        [m.label, format_weight(m.weight), str(m.rank), f"{m.checkpoint.parameters:,}",
         human_bytes(m.checkpoint.bytes), "+".join(m.trained_on) or "-"]
        for m in plan.members
    ]  # fmt: skip
    return ["member", "weight", "rank", "parameters", "size", "trained on"], rows


def _plots(picture: Picture) -> dict[str, Any]:
    several = len(picture.maps) > 1
    plots = [
        heat_plot(f"{picture.title} {heat.grid.block}" if several else picture.title, heat) for heat in picture.maps
    ]
    return {"title": picture.title, "plots": plots, "outside": picture.outside}


def _tree(lineage: Sequence[LineageNode], labels: Sequence[str]) -> tuple[Plot, int] | None:
    """Lineage, of a stack's members and their relatives, and how many more there are than are drawn."""
    if not lineage:
        return None
    near = relatives(lineage, labels)
    looks = {one.label: "removed" for one in near if one.removed} | dict.fromkeys(labels, "member")
    nodes = [
        (len(guide) // 4, name, remark, looks.get(name, "") if guide else "root")
        for guide, name, remark in tree_lines(near, [])
    ]
    return tree_plot("which version was trained on which", nodes[:_MOST_VERSIONS]), max(0, len(nodes) - _MOST_VERSIONS)


def _interference(found: Interference) -> dict[str, Any]:
    pairs = found.most_opposed_first
    drawn = pairs[:SERIES]
    return {
        "table": _pair_table(pairs),
        "matrix": _matrix(found.pairs) if len(found.pairs) > 1 else None,
        "lines": [
            (what, line_plot(f"{what} by layer", {p.title: _by_layer(p, name) for p in drawn}, least=least))
            for what, name, least in (
                ("cosine", "cosine", 0.05), ("overlap of column spaces (outputs)", "columns", 0.1),
                ("overlap of row spaces (inputs)", "rows", 0.1),
            )
            if any(value is not None for p in drawn for _, value in _by_layer(p, name))
        ],
        "lines_left": len(pairs) - len(drawn),
        "maps": [_plots(picture) for picture in cosine_pictures(pairs[:_MOST_MAPS])],
        "maps_left": max(0, len(pairs) - _MOST_MAPS),
        "apart": [pair.title for pair in found.pairs if not pair.modules],
        "left_out": [
            (left.member if left.module is None else f"{left.module} of {left.member}", left.why)
            for left in found.not_compared
        ],
    }  # fmt: skip


def _pair_table(pairs: Sequence[PairOverlap]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for pair in pairs:
        total = pair.total
        told = figures(total)
        worst = ", ".join(f"{layer} ({signed(cosine, 3)})" for layer, cosine in pair.most_opposed)
        modules = f"{len(pair.modules)} of {len(pair.modules) + sum(pair.unshared)}"
        rows.append(
            [pair.title, told["cosine"], _with_chance(told["columns"], total.column_chance),
             _with_chance(told["rows"], total.row_chance), modules, worst]
        )  # fmt: skip
    return ["pair", "cosine", "columns", "rows", "shared modules", "most opposed in"], rows


def _with_chance(share: str, chance: float | None) -> str:
    return share if chance is None else f"{share} ({chance:.2f})"


def _matrix(pairs: Sequence[PairOverlap]) -> Plot:
    members = list(dict.fromkeys(member for pair in pairs for member in pair.members))
    values = {(members.index(p.members[0]), members.index(p.members[1])): p.total.cosine for p in pairs}
    top = max([0.1, *(abs(value) for value in values.values() if value is not None)])
    return matrix_plot("cosines of every two members", members, values, top)


def _by_layer(pair: PairOverlap, name: str) -> list[tuple[int, float | None]]:
    """One number of a pair's layers; blocks of layers with the same numbers are taken together."""
    by_number = pair.pooled(lambda where: None if where.layer is None else str(where.layer))
    return sorted((int(number), getattr(overlap, name)) for number, overlap in by_number.items())
