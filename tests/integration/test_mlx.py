"""mlx-lm's adapters, read and written, by its format and by the arithmetic of its LoRALinear in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

KEYS = ["mlp.down_proj", "self_attn.q_proj"]


def mlx_folder(
    base: Path, out: Path, kind: str = "lora", dtype: torch.dtype = torch.float32, scale: float = 0.3
) -> Path:
    """What ``mlx_lm.lora`` leaves (mlx_lm/lora.py, tuner/trainer.py), with random factors."""
    generator = torch.Generator().manual_seed(3)
    state = AutoModelForCausalLM.from_pretrained(base).state_dict()
    tensors = {}
    for name, weight in state.items():
        module = name.removesuffix(".weight")
        if module.endswith(tuple(KEYS)):
            rows, columns = weight.shape
            tensors[f"{module}.lora_a"] = torch.randn(columns, 3, generator=generator) * 0.3
            tensors[f"{module}.lora_b"] = torch.randn(3, rows, generator=generator) * 0.3
            if kind == "dora":
                tensors[f"{module}.m"] = weight.norm(dim=1) * (1 + 0.2 * torch.rand(rows, generator=generator))
    out.mkdir()
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, out / "adapters.safetensors")
    parameters = {"rank": 3, "scale": scale, "dropout": 0.0, "keys": KEYS}
    config = {"fine_tune_type": kind, "num_layers": 2, "lora_parameters": parameters, "model": str(base), "seed": 0}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def mlx_logits(base: Path, folder: Path) -> torch.Tensor:
    """The base with mlx-lm's layers in it: LoRALinear and DoRALinear as mlx_lm/tuner has them, by numpy."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_parameters"]["scale"]
    tensors = {name: t.double().numpy() for name, t in load_file(folder / "adapters.safetensors").items()}
    model = oracle.load_plain(base, torch.float64)
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        a, b, m = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], tensors.get(f"{name}.m")
        module = model.get_submodule(name)
        weight = module.weight.detach().numpy()

        def forward(x: Any, weight: Any = weight, a: Any = a, b: Any = b, m: Any = m, bias: Any = module.bias) -> Any:
            inputs = x.detach().numpy()
            out = inputs @ weight.T + scale * ((inputs @ a) @ b)
            if m is not None:
                out = m / np.linalg.norm(weight + (scale * b.T) @ a.T, axis=1) * out
            return torch.from_numpy(out) + (0 if bias is None else bias)

        module.forward = forward
    return oracle.logits(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.3, 20.0, 0.1])
def test_a_round_trip_changes_no_bit(tiny_registry: Any, dtype: torch.dtype, scale: float) -> None:
    h = tiny_registry("qwen2")
    folder = mlx_folder(h.base, h.folder / "mlx", dtype=dtype, scale=scale)
    added = h.run("add", "x", folder, "--json").json
    assert (added["adapter"], added["version"], added["base"]) == ("x", 1, "tiny")
    assert h.run("add", "x", folder, "--json").json["version"] == 1
    written = h.run("export", "x", "--format", "mlx", "--out", h.folder / "out", "--json").json
    assert (written["format"], written["rank"], written["exact"], written["max_relative_error"]) == ("mlx", 3, True, 0)
    assert {f["path"] for f in written["files"]} == {"adapters.safetensors", "adapter_config.json"}
    before, after = (load_file(place / "adapters.safetensors") for place in (folder, h.folder / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name])
    own, theirs = (json.loads((p / "adapter_config.json").read_text()) for p in (h.folder / "out", folder))
    assert own["lora_parameters"] == theirs["lora_parameters"]
    assert (own["num_layers"], own["fine_tune_type"]) == (2, "lora")


def test_what_is_read_computes_what_mlx_lm_does(tiny_registry: Any) -> None:
    h = tiny_registry("qwen2")
    folder = mlx_folder(h.base, h.folder / "mlx")
    h.run("add", "x", folder)
    wanted, plain = mlx_logits(h.base, folder), oracle.logits(oracle.load_plain(h.base, torch.float64))
    stacked = h.load()
    assert oracle.relative(h.logits(stacked, "x"), wanted, plain) < 1e-5
    h.add("style", seed=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    for expression in ("style", "x:0.7+style"):
        out = h.folder / expression.replace(":", "-")
        made = h.run("export", expression, "--format", "mlx", "--out", out, "--json").json
        assert made["exact"]
        assert oracle.relative(mlx_logits(h.base, out), h.logits(stacked, expression), plain) < 1e-5
    keys = json.loads((out / "adapter_config.json").read_text())["lora_parameters"]["keys"]
    assert keys == ["mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"]
    rough = h.run("export", "x:0.7+style", "--format", "mlx", "--dtype", "bfloat16", "--out", h.folder / "b", "--json")
    assert 1e-4 < rough.json["max_relative_error"] < 0.02 and not rough.json["exact"]


def test_gpt2_is_called_otherwise(tiny_registry: Any) -> None:
    h = tiny_registry("gpt2")
    h.add("x", seed=1)
    h.run("export", "x", "--format", "mlx", "--out", h.folder / "out")
    tensors = load_file(h.folder / "out" / "adapters.safetensors")
    assert tensors["model.h.0.attn.c_attn.lora_a"].shape == (32, 4)
    assert tensors["model.h.0.attn.c_attn.lora_b"].shape == (4, 96)
    h.run("add", "again", h.folder / "out", "--base", "tiny")
    stacked = h.load()
    assert torch.equal(h.logits(stacked, "again"), h.logits(stacked, "x"))


def test_a_dora_is_converted(tiny_registry: Any) -> None:
    h = tiny_registry("qwen2")
    folder = mlx_folder(h.base, h.folder / "mlx", "dora", scale=2.0)
    refused = h.run("add", "x", folder, code=4)
    assert f"stackctl add x {folder} --convert" in refused.err
    h.run("add", "x", folder, "--convert", "--tolerance", 1e-6)
    wanted, plain = mlx_logits(h.base, folder), oracle.logits(oracle.load_plain(h.base, torch.float64))
    assert oracle.relative(h.logits(h.load(), "x"), wanted, plain) < 1e-4


def test_what_mlx_lm_cannot_hold_or_is_broken_is_refused(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    h.add("head", seed=1, target_modules=["embed_tokens"])
    refused = h.run("export", "head", "--format", "mlx", "--out", h.folder / "out", code=4)
    assert "embed_tokens" in refused.err and not (h.folder / "out").exists()
    folder = mlx_folder(h.base, h.folder / "mlx")
    h.run("add", "x", folder, "--link", code=2)
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapters.safetensors")
    tensors.pop(min(tensors))
    save_file({**tensors, "odd.weight": torch.zeros(2)}, folder / "adapters.safetensors")
    config["lora_parameters"] = {"rank": 3}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    refused = h.run("add", "x", folder, code=4)
    assert all(word in refused.err for word in ("scale", "odd.weight", "lora_a"))
    (folder / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "full"}))
    assert "stackctl extract" in h.run("add", "x", folder, code=4).err
    assert h.adapters() == {"head"}
