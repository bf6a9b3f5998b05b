"""Methods beside the exact sum: what is folded, written and reported is what the method makes, measured here again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file
from tiny_registry import made_once

from stackctl.plan import methods
from stackctl.plan.methods import SUM

METHODS = {
    "svd": ("--rank", "3"),
    "ties": ("--density", "0.4"),
    "dare_linear": ("--density", "0.6", "--seed", "7"),
    "dare_ties": ("--density", "0.6"),
    "magnitude_prune": ("--density", "0.5"),
    "knots_ties": ("--density", "0.4"),
    "tsv": (),
    "iso_c": (),
    "core_ties": ("--density", "0.4"),
}
ALIGNED = ("knots_ties", "tsv", "iso_c", "core_ties")


def test_every_method_is_tried_here() -> None:
    assert {SUM, *METHODS} == set(methods.METHODS)


@pytest.fixture
def style_and_instruct(h: Any) -> Any:

    def make() -> None:
        h.add("style", seed=1)
        h.add("instruct", seed=2, r=3, use_rslora=True)

    made_once(h.folder, h.base.with_name("methods-registry"), make)
    h.paths = {name: h.folder / "made" / name for name in ("style", "instruct")}
    return h


def folded_deltas(h: Any, what: str) -> dict[str, torch.Tensor]:
    """What folding a stack added to each module's weight, in float64, measured on the weights themselves."""
    stacked = h.load()
    before = {name: p.double().clone() for name, p in stacked.model.named_parameters()}
    plan = h.plan(what)
    stacked.use(plan)
    return {
        name: stacked.model.get_parameter(f"{name}.weight").double() - before[f"{name}.weight"] for name in plan.modules
    }


def overall(h: Any, deltas: dict[str, torch.Tensor]) -> float:
    """‖made - sum‖ / ‖sum‖ over all modules, against float64 sums straight from the files."""
    lost = total = 0.0
    for name, made in deltas.items():
        exact = oracle.exact_delta([(h.paths["style"], 1.0), (h.paths["instruct"], 1.0)], name)
        lost, total = lost + float((made - exact).square().sum()), total + float(exact.square().sum())
    return (lost / total) ** 0.5


@pytest.mark.parametrize("method", METHODS)
def test_the_error_that_is_reported_is_the_one_of_the_folded_weights(style_and_instruct: Any, method: str) -> None:
    report = style_and_instruct.run(
        "compose", "style+instruct", "--name", "s", "--method", method, *METHODS[method], "--json"
    ).json
    assert report["exact"] is False
    assert report["method"] == method
    assert report["relative_error"] > 0.01
    assert overall(style_and_instruct, folded_deltas(style_and_instruct, "s")) == pytest.approx(
        report["relative_error"], rel=1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_random_method_is_repeatable_and_switching_restores_the_base(style_and_instruct: Any, method: str) -> None:
    style_and_instruct.run("compose", "style+instruct", "--name", "s", "--method", method, *METHODS[method])
    stacked = style_and_instruct.load()
    bare = style_and_instruct.logits(stacked, "base")
    first = style_and_instruct.logits(stacked, "s")
    assert torch.equal(style_and_instruct.logits(stacked, "base"), bare)
    assert torch.equal(style_and_instruct.logits(stacked, "s"), first)
    assert not torch.equal(first, bare)


def test_svd_of_the_full_rank_is_the_sum(style_and_instruct: Any) -> None:
    report = style_and_instruct.run(
        "compose", "style+instruct", "--name", "s", "--method", "svd", "--rank", "64", "--json"
    ).json
    assert report["relative_error"] < 1e-5
    stacked = style_and_instruct.load()
    error = oracle.relative(
        style_and_instruct.logits(stacked, "s"),
        style_and_instruct.live(("style", 1.0), ("instruct", 1.0)),
        style_and_instruct.live(),
    )
    assert error < 1e-5


def test_the_automatic_rank_keeps_every_module_within_tolerance(style_and_instruct: Any) -> None:
    options = ("--method", "svd", "--rank", "auto", "--tolerance", "0.3")
    report = style_and_instruct.run("compose", "style+instruct", "--name", "s", *options, "--json").json
    assert report["worst_relative_error"] <= 0.3
    assert report["rank"] < 7
    written = style_and_instruct.run("export", "s", "--out", style_and_instruct.folder / "out", "--json").json
    assert written["rank"] == report["rank"]
    assert written["max_relative_error"] == pytest.approx(report["worst_relative_error"], rel=1e-3)
    ranks = {
        t.shape[0]
        for n, t in load_file(style_and_instruct.folder / "out" / "adapter_model.safetensors").items()
        if "lora_A" in n
    }
    assert max(ranks) == report["rank"]


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_a_full_matrix_is_written_at_the_rank_that_was_planned(style_and_instruct: Any, method: str) -> None:
    style_and_instruct.run(
        "compose", "style+instruct", "--name", "s", "--method", method, "--density", "0.5", "--rank", "5"
    )
    report = style_and_instruct.run("export", "s", "--out", style_and_instruct.folder / "out", "--json").json
    assert report["rank"] == 5
    assert report["exact"] is False
    worst = 0.0
    tensors = load_file(style_and_instruct.folder / "out" / "adapter_model.safetensors")
    for name in style_and_instruct.plan("s").modules:
        exact = oracle.exact_delta(
            [(style_and_instruct.paths["style"], 1.0), (style_and_instruct.paths["instruct"], 1.0)], name
        )
        key = f"base_model.model.{name}"
        made = tensors[f"{key}.lora_B.weight"].double() @ tensors[f"{key}.lora_A.weight"].double()
        worst = max(worst, float((made - exact).norm() / exact.norm()))
    assert report["max_relative_error"] == pytest.approx(worst, rel=1e-3)


@pytest.mark.parametrize("method", ALIGNED)
def test_a_pair_is_written_and_folded_as_it_was_made(style_and_instruct: Any, method: str) -> None:
    """What is exported is what is folded, at the members' ranks together; the order of the members changes nothing."""
    options = METHODS[method]
    report = style_and_instruct.run(
        "compose", "style+instruct", "--name", "s", "--method", method, *options, "--json"
    ).json
    assert report["rank"] == max(module.rank for module in style_and_instruct.plan("s").modules.values())
    written = style_and_instruct.run("export", "s", "--out", style_and_instruct.folder / "out", "--json").json
    assert (written["rank"], written["exact"]) == (report["rank"], False)
    assert written["max_relative_error"] == pytest.approx(report["worst_relative_error"], rel=1e-4)
    style_and_instruct.run("compose", "instruct+style", "--name", "t", "--method", method, *options)
    other = folded_deltas(style_and_instruct, "t")
    for name, delta in folded_deltas(style_and_instruct, "s").items():
        assert (
            float((oracle.exact_delta([(style_and_instruct.folder / "out", 1.0)], name) - delta).norm() / delta.norm())
            < 1e-6
        )
        assert torch.equal(delta, other[name])


@pytest.mark.parametrize("method", ALIGNED)
def test_a_pair_is_cut_to_a_rank_wherever_it_stands(style_and_instruct: Any, method: str) -> None:
    report = style_and_instruct.run(
        "compose", "style+instruct", "--name", "s", "--method", method, "--rank", "2", "--json"
    ).json
    assert report["rank"] == 2
    assert style_and_instruct.run("export", "s", "--out", style_and_instruct.folder / "out", "--json").json["rank"] == 2
    for delta in folded_deltas(style_and_instruct, "s").values():
        assert float(torch.linalg.svdvals(delta)[2:].norm() / delta.norm()) < 1e-6


@pytest.mark.parametrize("method", ALIGNED)
@pytest.mark.parametrize("name", ["gpt2", "mixtral", "tied", "gemma"])
def test_embeddings_heads_transposed_layers_and_experts_come_back_as_one_adapter(
    tiny_registry: Any, name: str, method: str
) -> None:
    h = tiny_registry(name)
    h.add_on_every_kind(name)
    h.run("compose", "style:0.5+instruct:-1.5", "--name", "s", "--method", method)
    h.run("export", "s", "--out", h.folder / "out")
    h.run("add", "again", h.folder / "out")
    stacked = h.load()
    bare = h.logits(stacked, "base")
    assert oracle.relative(h.logits(stacked, "again"), h.logits(stacked, "s"), bare) < 1e-6


def test_a_method_says_how_far_it_is(style_and_instruct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stackctl.cli.progress._PATIENCE", 0.0)
    monkeypatch.setattr("stackctl.cli.progress._BETWEEN_LINES", 0.0)
    modules = len(style_and_instruct.plan("style+instruct").modules)
    shown = style_and_instruct.run("compose", "style+instruct", "--name", "s", "--method", "ties").err
    shares = [line.partition(": ")[2] for line in shown.splitlines() if line.startswith("merging by ties: ")]
    assert shares == [f"{done / modules:.0%}" for done in range(1, modules)]
    assert "merging" not in style_and_instruct.run("compose", "style+instruct", "--name", "t").err
    nothing = style_and_instruct.run("compose", "style:0", "--name", "u", "--method", "ties", "--json").json
    assert (nothing["relative_error"], nothing["worst_relative_error"], nothing["worst_module"]) == (0, 0, "")


@pytest.mark.parametrize("method", METHODS)
def test_a_change_that_overflows_is_named(style_and_instruct: Any, method: str) -> None:
    """Factors that are numbers, whose product is none in float32: a failure on the way to JSON, told as a bug."""
    style_and_instruct.add("huge", seed=3, scale=1e25)
    whole = method in ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # those that multiply the factors out
    asked = ("compose", "huge+style", "--method", method, *METHODS[method], "--dry-run", "--json")
    ran = style_and_instruct.run(*asked, code=5 if whole else 0)
    assert ("does not fit float32" in ran.err) == whole
    assert whole or math.isfinite(ran.json["relative_error"])
    more = "huge:1e300+style"
    for line in (("compose", more, *asked[2:]), ("inspect", more, "--weights", "--json")):
        assert "does not fit float32" in style_and_instruct.run(*line, code=5).out


def test_modules_are_made_on_all_cores_in_the_order_of_the_plan(style_and_instruct: Any) -> None:
    from stackctl.engine.merging import each_module
    from stackctl.engine.tensors import MemberTensors

    style_and_instruct.run("compose", "style+instruct", "--name", "s", "--method", "ties")
    plan, threads = style_and_instruct.plan("s"), torch.get_num_threads()
    with MemberTensors(plan) as tensors:
        found = list(each_module(plan, tensors, lambda module, factors: (module.name, torch.get_num_threads())))
    assert [(module.name, made) for module, made in found] == [(name, (name, 1)) for name in plan.modules]
    assert torch.get_num_threads() == threads


def test_a_stack_that_is_no_sum_is_no_term_and_no_foundation(style_and_instruct: Any) -> None:
    style_and_instruct.run("compose", "style+instruct", "--name", "s", "--method", "ties")
    style_and_instruct.run("inspect", "s:0.5", code=4)
    style_and_instruct.run("train", "more", "--on", "s", "--data", style_and_instruct.data(), code=4)


def test_the_norms_that_inspect_shows_are_those_of_the_deltas(style_and_instruct: Any) -> None:
    shown = style_and_instruct.run("inspect", "style:0.5+instruct:-2", "--weights", "--json").json["weights"]
    assert len(shown) == len(style_and_instruct.plan("style").modules)
    for row in shown:
        parts = [(style_and_instruct.paths["style"], 0.5), (style_and_instruct.paths["instruct"], -2.0)]
        both = oracle.exact_delta(parts, row["module"])
        style = oracle.exact_delta(parts[:1], row["module"])
        assert row["norm"] == pytest.approx(float(both.norm()), rel=1e-5)
        assert row["members"]["style@1"] == pytest.approx(float(style.norm()), rel=1e-5)


def test_export_then_inspect_is_the_same_plan(style_and_instruct: Any, tmp_path: Path) -> None:
    """Written, read back and planned again: the same modules, and the sum of the ranks."""
    style_and_instruct.run("export", "style+instruct", "--out", tmp_path / "out")
    style_and_instruct.run("add", "both", tmp_path / "out")
    one, two = style_and_instruct.plan("both"), style_and_instruct.plan("style+instruct")
    assert {n: (m.shape, m.rank) for n, m in one.modules.items()} == {
        n: (m.shape, m.rank) for n, m in two.modules.items()
    }
    assert not one.problems
