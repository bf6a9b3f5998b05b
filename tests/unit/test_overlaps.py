"""What follows from the overlaps of modules: layers, pairs, and where two members are opposed."""

from __future__ import annotations

import pytest

from stackctl.cli.inspect_maps import cosine_pictures, norm_pictures
from stackctl.engine.overlaps import ModuleOverlap, Overlap, PairOverlap, pool


def overlap(cosine: float | None, norms: tuple[float, float] = (1.0, 1.0), columns: float | None = 0.5) -> Overlap:
    return Overlap(norms, cosine, columns, columns, 0.1, 0.2)


def pair(**cosines: tuple[float | None, tuple[float, float]]) -> PairOverlap:
    """Modules by name, with ``_`` for dots."""
    modules = [ModuleOverlap(name.replace("_", "."), (2, 2), overlap(*found)) for name, found in cosines.items()]
    return PairOverlap(("style@1", "instruct@1"), tuple(modules), (0, 3))


def test_modules_together_are_the_blocks_of_one_matrix() -> None:
    """Two diagonal blocks: inner products add up, and so do squares of norms."""
    both = pool([overlap(-0.5, (3.0, 1.0)), overlap(1.0, (4.0, 2.0), columns=0.1)])
    assert both.norms == pytest.approx((5.0, 5**0.5))
    assert both.cosine == pytest.approx((-0.5 * 3 + 1.0 * 8) / (5 * 5**0.5))
    assert both.columns == pytest.approx(0.3)
    assert both.row_chance == pytest.approx(0.2)


def test_nothing_has_no_direction() -> None:
    zero = Overlap((0.0, 2.0), None, None, None, None, None)
    assert pool([]) == Overlap((0.0, 0.0), None, None, None, None, None)
    assert pool([zero]).cosine is None
    assert pool([zero, overlap(1.0, (1.0, 1.0))]).cosine == pytest.approx(1 / 5**0.5)  # the 2 still counts


def test_the_three_layers_with_the_lowest_cosines_are_told_lowest_first() -> None:
    most_opposed = pair(
        h_0_q=(0.2, (1, 1)), h_1_q=(-0.9, (0.1, 0.1)), h_1_v=(0.5, (9, 9)), h_2_q=(-0.1, (1, 1)), h_3_q=(-0.3, (1, 1)),
        head=(-0.2, (1, 1)), h_4_q=(None, (0, 1)),
    ).most_opposed  # fmt: skip
    assert [name for name, _ in most_opposed] == ["h.3", "head", "h.2"]  # what is opposed in h.1 is a small part of it
    assert [cosine for _, cosine in most_opposed] == pytest.approx([-0.3, -0.2, -0.1])


def test_a_pair_as_json() -> None:
    told = pair(h_0_q=(0.25, (1, 2)), h_0_v=(-0.25, (1, 2))).json()
    assert told["members"] == ["style@1", "instruct@1"]
    assert told["cosine"] == pytest.approx(0.0)
    assert told["unshared"] == [0, 3]
    assert [m["module"] for m in told["modules"]] == ["h.0.q", "h.0.v"]
    assert [(layer["layer"], layer["cosine"]) for layer in told["layers"]] == [("h.0", pytest.approx(0.0))]
    assert told["modules"][0] == {
        "module": "h.0.q", "layer": "h.0", "ranks": [2, 2], "norms": [1, 2], "cosine": 0.25, "columns": 0.5,
        "rows": 0.5, "column_chance": 0.1, "row_chance": 0.2,
    }  # fmt: skip


def test_maps_of_a_stack_share_a_scale_and_that_of_one_adapter_is_its_own() -> None:
    rows = [
        {"module": "h.0.e.0.w", "norm": 3.0, "members": {"a@1": 3.0}},
        {"module": "h.0.e.1.w", "norm": 4.0, "members": {"a@1": 4.0, "b@1": 1.0}},
        {"module": "lm_head", "norm": 50.0, "members": {"b@1": 50.0}},
    ]
    total, a, b = norm_pictures(rows)
    assert [p.title for p in (total, a, b)] == ["‖ΔW‖ of the sum", "‖ΔW‖ of a@1", "‖ΔW‖ of b@1"]
    assert dict(a.maps[0].values) == {("e.*.w", 0): 5.0}  # √(3² + 4²)
    assert {heat.top for p in (total, a, b) for heat in p.maps} == {5.0}  # what is outside has no part in it
    assert total.outside == (("lm_head", "50"),) and not a.outside
    only = [{**row, "members": {"a@1": row["norm"]}} for row in rows]
    assert [p.title for p in norm_pictures(only)] == ["‖ΔW‖ of a@1"]


def test_the_scale_of_cosines_is_not_that_of_noise() -> None:
    (faint,) = cosine_pictures([pair(h_0_q=(-0.003, (1, 1)))])
    assert faint.maps[0].top == 0.1
    (strong,) = cosine_pictures([pair(h_0_q=(-0.7, (1, 1)), head=(0.1, (1, 1)))])
    assert strong.maps[0].top == 0.7
    assert strong.maps[0].beside == {"cosine": ["-0.700"], "columns": ["0.50"], "rows": ["0.50"]}
    assert strong.outside == (("head", "cosine +0.100, columns 0.50, rows 0.50"),)
