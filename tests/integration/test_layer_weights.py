"""A weight by layer or module stands in place of a member's weight: folded, live and in every export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-6
BY_HAND = {
    "model.layers.0": 0.25,
    "model.layers.1.self_attn.q_proj": 3.0,
    "model.layers.1.mlp.up_proj": 0.0,
    "model.layers.1.mlp": -0.5,
}


def weight_of(module: str) -> float:
    """What BY_HAND says of a module of ``style``, whose weight is 2 elsewhere."""
    if ".layers.0." in module:
        return 0.25
    return {"self_attn.q_proj": 3.0, "mlp.up_proj": 0.0, "mlp.down_proj": -0.5, "mlp.gate_proj": -0.5}.get(
        module.partition(".layers.1.")[2], 2.0
    )


def edit(h: Any, name: str, layer_weights: dict[str, float]) -> None:
    """Write weights into the first member of a stored stack, as a person would."""
    path = h.folder / "registry" / "stacks" / f"{name}.yaml"
    entry = yaml.safe_load(path.read_text())
    entry["members"][0]["layer_weights"] = layer_weights
    path.write_text(yaml.safe_dump(entry, sort_keys=False))


@pytest.fixture
def layered(h: Any) -> Any:
    h.add("style", seed=1)
    h.add("instruct", seed=2, r=3, use_rslora=True)
    h.run("compose", "style:2+instruct:0.5", "--name", "s")
    edit(h, "s", BY_HAND)
    return h


@pytest.fixture
def expected(layered: Any) -> torch.Tensor:
    """Raw PEFT's logits with each module's scaling multiplied by hand."""
    model = oracle.live(layered.base, (layered.paths["style"], 1.0), (layered.paths["instruct"], 0.5))
    first = next(iter(model.peft_config))
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and first in module.scaling:
            module.scaling[first] *= weight_of(name.removeprefix("base_model.model."))
    return oracle.logits(model)


def error(layered: Any, found: torch.Tensor, expected: torch.Tensor) -> float:
    return oracle.relative(found, expected, layered.live())


def test_folded_live_and_every_export_are_the_same(layered: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    assert error(layered, layered.live(("style", 2.0), ("instruct", 0.5)), expected) > 0.1, "they do something"
    stacked = layered.load()
    assert error(layered, layered.logits(stacked, "s"), expected) < 1e-5
    stacked.use(layered.plan("s"), live=True)
    assert error(layered, oracle.logits(stacked.model), expected) < 1e-5
    folded = layered.logits(stacked, "s")
    layered.run("export", "s", "--format", "peft", "--out", tmp_path / "peft")
    peft = PeftModel.from_pretrained(oracle.load_plain(layered.base), tmp_path / "peft")
    layered.run("export", "s", "--format", "model", "--out", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for other in (oracle.logits(peft), oracle.logits(model)):
        assert float((other - folded).abs().max() / folded.abs().max()) < TOLERANCE


def test_the_deltas_that_are_written_are_the_weighted_ones(layered: Any, tmp_path: Path) -> None:
    style, instruct = oracle.deltas(layered.paths["style"]), oracle.deltas(layered.paths["instruct"], 0.5)
    wanted = oracle.added(
        {name: value * weight_of(name.removeprefix("base_model.model.")) for name, value in style.items()}, instruct
    )
    layered.run("export", "s", "--format", "peft", "--out", tmp_path / "peft")
    tensors = oracle.factors_of(tmp_path / "peft")  # with alpha = rank on every module
    written = {
        name.removesuffix(".lora_A.weight"): tensors[name.replace("lora_A", "lora_B")] @ a
        for name, a in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    assert set(written) == set(wanted)
    for name, delta in wanted.items():
        assert float((written[name] - delta).norm() / delta.norm()) < TOLERANCE, name
    layered.run("export", "s", "--format", "gguf", "--dtype", "float32", "--out", tmp_path / "gguf")
    [file] = (tmp_path / "gguf").glob("*.gguf")
    reader = gguf.GGUFReader(file)
    stored = {t.name: np.array(t.data, dtype=np.float64) for t in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    for layer in (0, 1):
        for short, name in (("ffn_down", "mlp.down_proj"), ("ffn_up", "mlp.up_proj")):
            a, b = (stored[f"blk.{layer}.{short}.weight.lora_{which}"] for which in "ab")
            delta = wanted[f"base_model.model.model.layers.{layer}.{name}"].numpy()
            assert np.linalg.norm(alpha / a.shape[0] * (b @ a) - delta) < TOLERANCE * np.linalg.norm(delta)


def test_they_are_shown_multiplied_and_compared(layered: Any) -> None:
    shown = layered.run("inspect", "s", "--json").json["members"]
    assert [m["layer_weights"] for m in shown] == [BY_HAND, {}]
    half = layered.run("compose", "s:0.5", "--name", "half", "--json").json["members"][0]
    assert half["weight"] == 1.0
    assert half["layer_weights"] == {name: value / 2 for name, value in BY_HAND.items()}
    assert "layer_weights" not in layered.run("ls", "--json").json["stacks"][0]["members"][1]


def test_what_they_cannot_mean_is_refused_by_name(layered: Any) -> None:
    data = layered.data()
    refused = layered.run("train", "new", "--on", "s", "--data", data, code=4)
    assert "weights by layer" in refused.err and "stackctl export s" in refused.err
    edit(layered, "s", {"model.layers.7": 0.5})
    refused = layered.run("inspect", "s", "--json").json["problems"]
    assert [p["code"] for p in refused] == ["layer_weights"] and "model.layers.7" in refused[0]["message"]
    assert "model.layers.7" in layered.run("generate", "s", "-p", "x", code=4).err
    edit(layered, "s", {"model.layers.0": float("nan")})
    assert "layer_weights" in layered.run("inspect", "s", code=2).err
