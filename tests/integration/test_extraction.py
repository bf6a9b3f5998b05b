"""``extract``: a planted change comes back, any other is as near as its singular values allow."""

from __future__ import annotations

import json
from typing import Any

import oracle
import pytest
import torch
from transformers import AutoModelForCausalLM
from tuned_models import planted, tuned_model

from stackctl.engine.to_lora.low_rank import LowRankPairs, Truncation


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("rank", [("--rank", 3), ("--rank", "auto", "--tolerance", 1e-3)])
def test_a_planted_change_comes_back(tiny_registry: Any, name: str, rank: tuple[object, ...]) -> None:
    h = tiny_registry(name)
    folder = tuned_model(h, planted)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, *rank, "--json").json
    assert found["relative_error"] < 1e-5
    assert (found["adapter"], found["version"], found["rank"]) == ("chat", 1, 3)
    assert found["modules"] > 0
    assert found["saved"]
    assert found["left_out"] == []
    wanted = oracle.logits(oracle.load_plain(folder))
    stacked = h.load()
    assert oracle.relative(h.logits(stacked, "chat"), wanted, oracle.logits(oracle.load_plain(h.base))) < 1e-4
    entry = h.run("inspect", "chat", "--json").json["extracted"]
    assert len(entry["errors"]) == found["modules"]
    assert max(entry["errors"].values()) < 1e-5
    assert h.run("verify", "--json").json["problems"] == []


@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_biases_come_along_with_the_layers_that_changed(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)

    def change(key: str, parameter: torch.Tensor) -> None:
        planted(key, parameter)
        if key.endswith("bias"):
            parameter += 0.2 * torch.randn_like(parameter)

    folder = tuned_model(h, change)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 3, "--json").json
    assert found["relative_error"] < 1e-5
    wanted, plain = (oracle.logits(oracle.load_plain(place)) for place in (folder, h.base))
    left = [key for key in found["left_out"] if not key.endswith("bias")]
    assert left == []
    if not found["left_out"]:
        assert oracle.relative(h.logits(h.load(), "chat"), wanted, plain) < 1e-4
        assert oracle.relative(oracle.logits(oracle.live(h.base, (h.weights("chat"), 1.0))), wanted, plain) < 1e-4
    assert set(found["left_out"]) <= {f"transformer.h.{i}.mlp.c_proj.bias" for i in range(2)} | {
        f"transformer.h.{i}.attn.c_proj.bias" for i in range(2)
    }


def test_a_full_change_is_cut_to_the_best_of_its_rank(h: Any) -> None:
    folder = tuned_model(h, lambda key, p: p.add_(0.1 * torch.randn_like(p)) if "proj" in key else None)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 4, "--json").json
    before, after = (AutoModelForCausalLM.from_pretrained(place).state_dict() for place in (h.base, folder))
    lost = total = 0.0
    for key in before:
        if "proj" in key:
            sigma = torch.linalg.svdvals(after[key].double() - before[key].double())
            lost, total = lost + float(sigma[4:].square().sum()), total + float(sigma.square().sum())
    assert found["relative_error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert "most of the change is lost" in h.run("extract", "low", "--base", "tiny", "--tuned", folder, "--rank", 1).err
    auto = h.run("extract", "near", "--base", "tiny", "--tuned", folder, "--rank", "auto", "--tolerance", 0.3, "--json")
    errors = h.run("inspect", "near", "--json").json["extracted"]["errors"].values()
    assert 0.1 < max(errors) <= 0.3 + 1e-6
    assert f"of the change is lost, at most {max(errors):.2%} of a module's" in " ".join(
        h.run("inspect", "near").out.split()
    )
    assert auto.json["rank"] > 4


def test_the_randomised_decomposition_is_within_a_hundredth_of_the_best() -> None:
    generator = torch.Generator().manual_seed(1)
    delta = torch.randn(1100, 900, generator=generator) / 30  # a flat spectrum, which is the hardest
    found = LowRankPairs(Truncation(32))
    found.keep("x", delta)
    (a, b), lost, total = found.pairs["x"], found.lost, found.total
    assert (a.shape, b.shape) == ((32, 900), (1100, 32))
    best = torch.linalg.svdvals(delta.double())[32:].square().sum()
    assert lost**0.5 <= 1.01 * float(best) ** 0.5
    assert lost == pytest.approx(float((delta.double() - b.double() @ a.double()).square().sum()), rel=1e-5)
    assert total == pytest.approx(float(delta.double().square().sum()))


def test_what_cannot_be_extracted_is_refused(h: Any, models: Any) -> None:
    cases: list[tuple[object, int, str]] = [
        (h.base, 4, "nothing was changed"),
        (models("gpt2"), 4, "not a fine-tune"),
        (h.folder / "nowhere", 3, "nowhere"),
        (tuned_model(h, lambda key, p: p.add_(0.1) if "norm" in key else None, "norms"), 4, "no linear layer"),
    ]
    for tuned, code, said in cases:
        ran = h.run("extract", "chat", "--base", "tiny", "--tuned", tuned, "--json", code=code)
        assert said in json.dumps(ran.json["error"])
    for options in (
        ("--rank", 0),
        ("--rank", "x"),
        ("--rank", 4, "--tolerance", 0.1),
        ("--rank", "auto", "--tolerance", 2),
    ):
        h.run("extract", "chat", "--base", "tiny", "--tuned", h.base, *options, code=2)
    assert h.adapters() == set()


def test_what_is_wrong_with_the_options_is_told_together(h: Any) -> None:
    wrong = ("--base", "other", "--tuned", h.folder / "nowhere", "--rank", 0, "--tolerance", 7, "--json")
    ran = h.run("extract", "NO", *wrong, code=2)
    message = ran.json["error"]["message"]
    assert all(word in message for word in ("NO", "other", "nowhere", "--rank 0", "--tolerance 7"))


def test_values_that_are_no_numbers_are_named(h: Any) -> None:
    """They were a failure inside the decomposition, told as a bug."""

    def break_two(key: str, parameter: torch.Tensor) -> None:
        planted(key, parameter)
        if "layers.1" in key and "proj" in key and parameter.ndim == 2 and ("up_" in key or "q_" in key):
            parameter[1, 2] = float("nan") if "up_" in key else float("-inf")

    ran = h.run("extract", "chat", "--base", "tiny", "--tuned", tuned_model(h, break_two), "--json", code=5)
    message = ran.json["error"]["message"]
    assert "layers.1.mlp.up_proj.weight of the fine-tune" in message and "q_proj.weight" in message
    assert h.adapters() == set()


def test_a_fine_tune_needs_no_tokenizer(h: Any) -> None:
    """Its weights alone are read; a Trainer that was given none saves none."""
    folder = tuned_model(h, planted)
    for file in folder.iterdir():
        if file.name != "config.json" and file.suffix != ".safetensors":
            file.unlink()
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 3, "--json").json
    assert found["relative_error"] < 1e-5


def test_a_fine_tune_on_the_hub_is_its_newest_commit(h: Any, hub: Any) -> None:
    folder = tuned_model(h, planted)
    hub.repo("acme/tuned", {path.name: path.read_bytes() for path in folder.iterdir()})
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", "acme/tuned", "--rank", 3, "--json").json
    assert found["relative_error"] < 1e-5
    told = h.run("inspect", "chat", "--json").json["extracted"]
    assert told["source"] == "acme/tuned" and len(told["revision"]) == 40
    h.run("extract", "other", "--base", "tiny", "--tuned", "acme/nothing", code=3)
    assert h.adapters() == {"chat"}
