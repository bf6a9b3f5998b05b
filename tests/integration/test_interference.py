"""``inspect --interference`` against dense matrices in float64: deltas written out, and their singular vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from stackctl.engine.interference import measure_interference
from stackctl.engine.overlaps import ModuleOverlap, PairOverlap
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember, StackPlan

Factors = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Module to A (rank, in) and B (out, rank)."""

OUT, IN = 24, 20
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def factors(seed: int, *modules: str, rank: int = 4, out: int = OUT, n: int = IN) -> Factors:
    random = np.random.default_rng(seed)
    return {
        name: (random.normal(size=(rank, n)).astype(np.float32), random.normal(size=(out, rank)).astype(np.float32))
        for name in modules
    }


def member(folder: Path, name: str, pairs: Factors, weight: float = 1.0, **config: Any) -> PlanMember:
    """A checkpoint of these factors with alpha 8, so that the scaling is 8 / rank."""
    path = folder / name
    path.mkdir(parents=True)
    rank = next(iter(pairs.values()))[0].shape[0]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": sorted(pairs), **config}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    tensors = {}
    for module, (a, b) in pairs.items():
        kind = "lora_embedding_{}" if "embed" in module else "lora_{}.weight"
        for letter, values in (("A", a), ("B", b)):
            tensors[f"base_model.model.{module}.{kind.format(letter)}"] = torch.from_numpy(values.copy())
    save_file(tensors, path / "adapter_model.safetensors")
    return PlanMember(f"{name}@1", weight, read_checkpoint(path), adapter=name)


def measured(*members: PlanMember) -> PairOverlap:
    plan = plan_stack(None, members)
    found = measure_interference(plan)
    assert not found.not_compared
    (pair,) = found.pairs
    return pair


def dense(pair: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    return scale * pair[1].astype(np.float64) @ pair[0].astype(np.float64)


def space(delta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal bases of the column space and of the row space of a matrix, from its own decomposition."""
    u, sigma, vh = np.linalg.svd(delta)
    rank = int((sigma > 1e-6 * sigma[0]).sum())
    return u[:, :rank], vh[:rank].T


def expect(found: ModuleOverlap, first: np.ndarray, second: np.ndarray) -> None:
    """The numbers of one module are those of two dense deltas."""
    overlap = found.overlap
    norms = np.linalg.norm(first), np.linalg.norm(second)
    assert overlap.norms == pytest.approx(norms, rel=1e-9)
    assert overlap.cosine == pytest.approx(float((first * second).sum()) / norms[0] / norms[1], abs=1e-7)
    spaces = zip(space(first), space(second), (overlap.columns, overlap.rows), strict=True)
    for one, other, share in spaces:
        assert found.ranks == (one.shape[1], other.shape[1])
        assert share == pytest.approx(np.square(one.T @ other).sum() / min(found.ranks), abs=1e-9)


def test_random_members_of_unlike_ranks_and_weights(tmp_path: Path) -> None:
    style, instruct = factors(1, Q, V), factors(2, Q, V, rank=3)
    pair = measured(member(tmp_path, "style", style, 0.5), member(tmp_path, "instruct", instruct, -2.0))
    assert pair.members == ("style@1", "instruct@1")
    assert [found.module for found in pair.modules] == [Q, V]
    for found in pair.modules:
        expect(found, dense(style[found.module], 0.5 * 8 / 4), dense(instruct[found.module], -2.0 * 8 / 3))
        assert found.overlap.column_chance == pytest.approx(4 / OUT)
        assert found.overlap.row_chance == pytest.approx(4 / IN)


def test_the_whole_pair_is_one_matrix_of_blocks(tmp_path: Path) -> None:
    style, instruct = factors(1, Q, V), factors(2, Q, V)
    pair = measured(member(tmp_path, "style", style), member(tmp_path, "instruct", instruct))
    one, other = (np.concatenate([dense(f[m], 2.0).ravel() for m in (Q, V)]) for f in (style, instruct))
    assert pair.total.cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), abs=1e-9)
    assert pair.total.norms == pytest.approx((np.linalg.norm(one), np.linalg.norm(other)))
    assert [name for name, _ in pair.most_opposed] == [
        name for name, _ in sorted(((n, o.cosine) for n, o in pair.layers.items()), key=lambda found: found[1])
    ]


@pytest.mark.parametrize(("weight", "cosine"), [(1.0, 1.0), (3.0, 1.0), (-1.0, -1.0)])
def test_an_adapter_lies_in_itself(tmp_path: Path, weight: float, cosine: float) -> None:
    style = factors(1, Q)
    pair = measured(member(tmp_path, "style", style), member(tmp_path, "again", style, weight))
    overlap = pair.modules[0].overlap
    assert (overlap.cosine, overlap.columns, overlap.rows) == pytest.approx((cosine, 1, 1), abs=1e-12)


def test_what_writes_elsewhere_does_not_interfere_though_it_reads_the_same(tmp_path: Path) -> None:
    a = factors(1, Q)[Q][0]
    upper, lower = np.zeros((OUT, 4), np.float32), np.zeros((OUT, 4), np.float32)
    upper[:4], lower[4:8] = np.eye(4), np.eye(4)
    overlap = measured(member(tmp_path, "up", {Q: (a, upper)}), member(tmp_path, "down", {Q: (a, lower)})).total
    assert (overlap.cosine, overlap.columns, overlap.rows) == pytest.approx((0, 0, 1), abs=1e-12)


def test_spaces_are_those_of_the_delta_and_not_of_its_factors(tmp_path: Path) -> None:
    """Rank 4 on paper, 2 in truth: two columns of B are never reached, and two more repeat others up to rounding."""
    a, b = factors(1, Q)[Q]
    thin_a = a.copy()
    thin_a[2:] = 0.0
    same_b = b.copy()
    same_b[:, 2:] = same_b[:, :2] * np.float32(1 / 3)
    other = factors(2, Q)
    for name, pair in (("unreached", (thin_a, b)), ("repeated", (a, same_b))):
        found = measured(member(tmp_path, name, {Q: pair}), member(tmp_path / name, "other", other)).modules[0]
        assert found.ranks == (2, 4)
        expect(found, dense(pair, 2.0), dense(other[Q], 2.0))


def test_more_rank_than_room(tmp_path: Path) -> None:
    wide, other = factors(1, Q, rank=30), factors(2, Q, rank=2)
    found = measured(member(tmp_path, "wide", wide), member(tmp_path, "other", other)).modules[0]
    assert found.ranks == (IN, 2)
    assert found.overlap.rows == pytest.approx(1.0)
    assert found.overlap.row_chance == 1.0
    expect(found, dense(wide[Q], 8 / 30), dense(other[Q], 4.0))


def test_an_untrained_delta_has_no_direction(tmp_path: Path) -> None:
    a, b = factors(1, Q)[Q]
    fresh = {Q: (a, np.zeros_like(b)), V: factors(3, V)[V]}
    pair = measured(member(tmp_path, "fresh", fresh), member(tmp_path, "other", factors(2, Q, V)))
    overlap = {found.module: found.overlap for found in pair.modules}
    assert overlap[Q].norms[0] == 0
    assert (overlap[Q].cosine, overlap[Q].columns, overlap[Q].rows) == (None, None, None)
    assert overlap[V].cosine is not None
    assert "model.layers.0" not in dict(pair.most_opposed)
    json.dumps(pair.json(), allow_nan=False)


def test_of_an_embedding_columns_are_what_is_written_and_rows_the_tokens(tmp_path: Path) -> None:
    """PEFT keeps A as (rank, vocabulary) and B as (dimension, rank), and adds (B @ A)ᵀ."""
    embed = "model.embed_tokens"
    one, other = factors(1, embed, out=8, n=50), factors(2, embed, out=8, n=50)
    found = measured(member(tmp_path, "one", one), member(tmp_path, "other", other)).modules[0]
    expect(found, dense(one[embed], 2.0), dense(other[embed], 2.0))
    assert found.overlap.row_chance == pytest.approx(4 / 50)


def test_ranks_that_differ_between_modules(tmp_path: Path) -> None:
    style = {**factors(1, Q), **factors(3, V, rank=2)}
    pattern = {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 6}, "use_rslora": True}
    instruct = factors(2, Q, V)
    pair = measured(member(tmp_path, "style", style, **pattern), member(tmp_path, "instruct", instruct))
    scales = {Q: 8 / 2, V: 6 / 2**0.5}  # alpha / √rank
    for found in pair.modules:
        expect(found, dense(style[found.module], scales[found.module]), dense(instruct[found.module], 2.0))


def plan(*members: PlanMember) -> StackPlan:
    return plan_stack(None, members)


def test_only_shared_modules_are_compared_and_the_others_counted(tmp_path: Path) -> None:
    members = member(tmp_path, "a", factors(1, Q)), member(tmp_path, "b", factors(2, V, Q)), member(
        tmp_path, "c", factors(3, V))  # fmt: skip
    found = measure_interference(plan(*members))
    seen = {pair.members: ([m.module for m in pair.modules], pair.unshared) for pair in found.pairs}
    assert seen == {
        ("a@1", "b@1"): ([Q], (0, 1)), ("a@1", "c@1"): ([], (1, 1)), ("b@1", "c@1"): ([V], (1, 0)),
    }  # fmt: skip


def test_what_is_no_delta_is_named_and_left_out(tmp_path: Path) -> None:
    one, two = member(tmp_path, "one", factors(1, Q, V)), member(tmp_path, "two", factors(2, Q, V))
    dora = member(tmp_path, "dora", factors(3, Q), use_dora=True)
    idle = member(tmp_path, "idle", factors(4, Q), 0.0)
    found = measure_interference(plan(one, dora, two, idle))
    assert [pair.members for pair in found.pairs] == [("one@1", "two@1")]
    left = {out.member: out for out in found.not_compared}
    assert set(left) == {"dora@1", "idle@1"}
    assert "DoRA" in left["dora@1"].why
    assert "weight 0" in left["idle@1"].why


@pytest.fixture
def pair_of_adapters(h: Any) -> Any:
    h.add("style", seed=1)
    h.add("instruct", seed=2, r=3)
    return h


def test_the_command_tells_the_same_as_the_engine(pair_of_adapters: Any) -> None:
    run = pair_of_adapters.run
    told = run("inspect", "style+instruct:-1", "--interference", "--json").json["interference"]
    assert told == json.loads(json.dumps(measure_interference(pair_of_adapters.plan("style+instruct:-1")).json()))
    assert len(told["pairs"][0]["modules"]) == 14
    plain = run("inspect", "style+instruct", "--interference", "--json").json["interference"]["pairs"][0]
    assert plain["cosine"] == pytest.approx(-told["pairs"][0]["cosine"])
    assert len(plain["most_opposed"]) == 2  # layers, of a model that has two


def test_whole_modules_are_named_as_not_compared(h: Any) -> None:
    h.add("style", seed=1, modules_to_save=["lm_head"])
    h.add("instruct", seed=2)
    told = h.run("inspect", "style+instruct", "--interference", "--json").json["interference"]
    assert [(left["member"], left["module"]) for left in told["not_compared"]] == [("style@1", "lm_head.weight")]
    assert "modules_to_save" in told["not_compared"][0]["why"]
    screen = h.run("inspect", "style+instruct", "--interference").out
    assert "not compared: lm_head.weight of style@1" in screen


@pytest.mark.parametrize("columns", [80, 200])
def test_the_screens_fit(pair_of_adapters: Any, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    pair_of_adapters.add("tone", seed=3, target_modules=["q_proj"])
    monkeypatch.setenv("COLUMNS", str(columns))
    both = pair_of_adapters.run("inspect", "style+instruct+tone", "--weights", "--interference").out
    assert max(map(len, both.splitlines())) <= columns
    for shown in ("‖ΔW‖ of the sum", "‖ΔW‖ of tone@1", "style@1", "× instruct@1", "most opposed in layer"):
        assert shown in both


def test_two_versions_of_an_adapter_can_be_compared(pair_of_adapters: Any) -> None:
    pair_of_adapters.run("add", "style", pair_of_adapters.paths["instruct"])
    told = pair_of_adapters.run("inspect", "style@1+style@2", "--interference", "--json").json["interference"]
    assert told["pairs"][0]["members"] == ["style@1", "style@2"]
    assert told["not_compared"] == []


@pytest.mark.parametrize("what", ["style", "base", "tiny", "made/style"])
def test_interference_takes_two_members(pair_of_adapters: Any, what: str) -> None:
    assert "hint:" in pair_of_adapters.run("inspect", what, "--interference", code=2).err
