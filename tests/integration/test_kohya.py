"""A LoRA in one file, as sd-scripts and LyCORIS write it, on a language model: the same numbers by other names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

TARGETS = ("q_proj", "down_proj", "c_attn", "c_proj", "query_key_value")


def lora_file(
    base: Path, out: Path, prefix: str = "lora_te", *, whole: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """What sd-scripts (networks/lora_lumina.py: create_modules) makes of a decoder's own linear layers, and LyCORIS of
    those of a whole model; each with a rank and an alpha of its own, one without alpha and one with zero."""
    generator = torch.Generator().manual_seed(1)
    model = (AutoModelForCausalLM if whole else AutoModel).from_pretrained(base)
    tensors = {}
    chosen = [(n, m) for n, m in model.named_modules() if n.endswith(TARGETS)]
    for place, (name, module) in enumerate(chosen):
        out_features, in_features = module.weight.shape if hasattr(module, "in_features") else module.weight.shape[::-1]
        rank, key = 2 + place % 3, f"{prefix}.{name}".replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = 0.3 * torch.randn(rank, in_features, generator=generator)
        tensors[f"{key}.lora_up.weight"] = 0.3 * torch.randn(out_features, rank, generator=generator)
        if place:
            tensors[f"{key}.alpha"] = torch.tensor(0 if place == 1 else 1.5 * place)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out, {"ss_network_module": "networks.lora"})
    return tensors


def merged_logits(base: Path, tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """The base with up @ down · alpha / rank in its weights, as LoRAModule.merge_to does it, in float64."""
    model = oracle.load_plain(base, torch.float64)
    found = 0
    for root in (model, model.base_model):
        for name, module in root.named_modules():
            key = f"{prefix}.{name}".replace(".", "_")
            if f"{key}.lora_down.weight" in tensors:
                down, up = (tensors[f"{key}.lora_{part}.weight"].double() for part in ("down", "up"))
                alpha = float(tensors.get(f"{key}.alpha", torch.tensor(0.0))) or len(down)
                delta = up @ down * (alpha / len(down))
                module.weight.data += delta if hasattr(module, "in_features") else delta.T
                found += 1
    assert found == sum(name.endswith("lora_down.weight") for name in tensors)
    return oracle.logits(model)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "neox"])
@pytest.mark.parametrize(("prefix", "whole"), [("lora_te", False), ("lycoris", True), ("lora_te1", True)])
def test_it_computes_what_it_did(tiny_registry: Any, name: str, prefix: str, whole: bool) -> None:
    h = tiny_registry(name)
    file = h.folder / "voice.safetensors"
    tensors = lora_file(h.base, file, prefix, whole=whole)
    added = h.run("add", "voice", file, "--base", "tiny", "--json").json
    assert (added["adapter"], added["version"], added["base"]) == ("voice", 1, "tiny")
    wanted, plain = merged_logits(h.base, tensors, prefix), oracle.logits(oracle.load_plain(h.base, torch.float64))
    assert oracle.relative(h.logits(h.load(), "voice"), wanted, plain) < 1e-5
    live = oracle.logits(oracle.live(h.base, (h.weights("voice"), 1.0)))
    assert oracle.relative(live, wanted, plain) < 1e-6
    assert h.run("add", "voice", file, "--json").json["version"] == 1, "the same file is the same version"
    assert h.run("verify", "--json").json["problems"] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_bit_of_a_factor_changes(tiny_registry: Any, dtype: torch.dtype) -> None:
    h = tiny_registry("qwen2")
    (h.folder / "lora").mkdir()
    given = lora_file(h.base, h.folder / "lora" / "voice.safetensors", dtype=dtype)
    h.run("add", "voice", h.folder / "lora")
    made = load_file(h.weights("voice") / "adapter_model.safetensors")
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    expected = 0
    for name, tensor in given.items():
        path, _, part = name.partition(".")
        if part in names:
            own = [
                n
                for n in made
                if n.endswith(names[part]) and n.replace(".", "_").find(path.removeprefix("lora_te_")) > 0
            ]
            assert len(own) == 1
            assert made[own[0]].dtype == dtype and torch.equal(made[own[0]], tensor)
            expected += 1
    assert len(made) == expected


def test_what_is_none_is_refused_by_name(h: Any) -> None:
    good = lora_file(h.base, h.folder / "good.safetensors")
    key = next(iter(good)).partition(".")[0]
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({**good, "lora_unet_layers_0_attention_qkv.lora_down.weight": torch.ones(2, 4)}, "image model"),
        ({"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 4)}, "image model"),
        ({"lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_down.weight": torch.ones(2, 4)}, "image model"),
        ({**good, f"{key}.dora_scale": torch.ones(32, 1)}, "DoRA"),
        ({f"{key}.hada_w1_a": torch.ones(32, 2)}, "LoHa"),
        ({f"{key}.lokr_w1": torch.ones(2, 2)}, "LoKr"),
        ({**good, "lora_te_layers_9_self_attn_q_proj.lora_down.weight": torch.ones(2, 32)}, "no linear layer of tiny"),
        ({**good, "lora_te_norm.lora_down.weight": torch.ones(2, 32)}, "no linear layer of tiny"),
        ({name: t for name, t in good.items() if name != f"{key}.lora_up.weight"}, "has no lora_up"),
        ({**good, f"{key}.lora_down.weight": torch.ones(2, 32, 1, 1)}, "[2, 32, 1, 1]"),
        ({**good, f"{key}.lora_down.weight": torch.ones(2, 31)}, "do not fit"),
        ({**good, f"{key}.lora_down.weight": torch.ones(3, 32)}, "factors"),
        ({**good, f"{key}.alpha": torch.ones(2)}, "F32 [2]"),
        ({**good, f"{key}.scalar": torch.ones(())}, "not part of a plain LoRA"),
    ]
    for number, (tensors, said) in enumerate(cases):
        file = h.folder / f"{number}.safetensors"
        save_file(tensors, file)
        error = h.run("add", "voice", file, "--base", "tiny", "--json", code=4).json["error"]
        if said != "factors":
            assert said in error["message"], error
    save_file({**good, f"{key}.alpha": torch.tensor(float("nan"))}, h.folder / "nan.safetensors")
    h.run("add", "voice", h.folder / "nan.safetensors", code=5)
    many = {f"lora_te_layers_{n}_self_attn_q_proj.lora_up.weight": torch.ones(32, 2) for n in range(7, 15)}
    save_file(many, h.folder / "many.safetensors")
    error = h.run("add", "voice", h.folder / "many.safetensors", "--json", code=4).json["error"]
    assert "and 3 more" in error["message"] and "--base" in error["hint"]
    linked = h.run("add", "voice", h.folder / "good.safetensors", "--link", "--json", code=2).json["error"]
    assert "--link" in linked["hint"]
    h.run("add", "voice", h.folder / "nothing.safetensors", code=3)
    assert h.adapters() == set()
    config = {"peft_type": "LORA", "r": 2}
    (h.folder / "adapter_config.json").write_text(json.dumps(config))


def test_a_name_that_may_be_two_modules_is_no_name(tiny_registry: Any) -> None:
    """``a_b`` and ``a.b`` are one name in such a file."""
    import msgspec

    from stackctl.core.errors import Incompatible
    from stackctl.core.schema import ModuleShape
    from stackctl.lora.kohya import read_kohya
    from stackctl.registry.base_entries import resolve_base

    h = tiny_registry()
    base = resolve_base(h.registry, "tiny")
    linear = ModuleShape(type="Linear", shape=[32, 32])
    twins = msgspec.structs.replace(base, modules={"model.layers_0.up": linear, "model.layers.0.up": linear})
    file = h.folder / "x.safetensors"
    save_file({"lora_te_layers_0_up.lora_down.weight": torch.ones(2, 32)}, file)
    with pytest.raises(Incompatible, match=r"may be model.layers_0.up or model.layers.0.up"):
        read_kohya(file, twins)
