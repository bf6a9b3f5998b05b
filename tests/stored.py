"""Tiny models stored as others store them: quantised in several schemes, or inside a class that also sees."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import SIZES, tiny_tokenizer

SCHEMES = ("fp8", "fp8-static", "mxfp8", "mxfp4", "bitsandbytes_4bit")
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
_QWEN_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4, "out_hidden_size": 32}
_QWEN_TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
_LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}


def _seeing(name: str) -> Any:
    if name == "qwen3_5":
        rope = {**_ROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
        text = dict(
            **SIZES, head_dim=16, **_LINEAR, layer_types=["linear_attention", "full_attention"], rope_parameters=rope
        )
        tower = {**_QWEN_TOWER, "num_position_embeddings": 16}
        return transformers.Qwen3_5Config(text_config=text, vision_config=tower, **_QWEN_TOKENS)
    if name == "gemma3":
        text = dict(**SIZES, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"])
        return transformers.Gemma3Config(
            text_config=text, vision_config=_TOWER, mm_tokens_per_image=4, image_token_index=250, boi_token_index=251,
            eoi_token_index=252,
        )  # fmt: skip
    if name == "qwen2_5_vl":
        tower = {**_QWEN_TOWER, "fullatt_block_indexes": [0]}
        return transformers.Qwen2_5_VLConfig(
            text_config=dict(**SIZES, rope_parameters=_ROPE), vision_config=tower, **_QWEN_TOKENS
        )
    if name == "mistral3":
        tower = {**_TOWER, "model_type": "pixtral", "head_dim": 8}
        text = dict(model_type="mistral", **SIZES, head_dim=8)
        return transformers.Mistral3Config(text_config=text, vision_config=tower, image_token_index=250)
    assert name == "llava"
    return transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SIZES), vision_config=transformers.CLIPVisionConfig(**_TOWER),
        image_token_index=250,
    )  # fmt: skip


SEEING = ("qwen3_5", "gemma3", "qwen2_5_vl", "mistral3", "llava")


def seeing_model(name: str, folder: Path) -> Path:
    """A model with a vision tower, as its own class (the one that ``config.json`` names) saves it."""
    _save(transformers.AutoModelForMultimodalLM.from_config(_seeing(name)), folder)
    return folder


def mixture(folder: Path) -> Path:
    """Experts that lie apart in the files and are one parameter in memory."""
    config = transformers.Qwen3MoeConfig(
        **SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    )
    _save(transformers.Qwen3MoeForCausalLM(config), folder)
    return folder


def _save(model: Any, folder: Path) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def quantised(scheme: str, folder: Path) -> Path:
    """A tiny Llama (for MXFP4 a tiny gpt-oss) whose weights are stored in a scheme that is read."""
    if scheme == "bitsandbytes_4bit":
        return _four_bits(folder)
    if scheme == "mxfp4":
        return _mxfp4(folder)
    _save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), folder)
    rows, columns = (1, 32) if scheme == "mxfp8" else (16, 16)
    stored: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "proj" not in name:
            stored[name] = weight
            continue
        high, wide = weight.shape
        blocks = weight.reshape(high // rows, rows, wide // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        if scheme == "mxfp8":
            scale = scale.log2().ceil().exp2()
        stored[name] = (blocks / scale[:, None, :, None]).reshape(high, wide).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = (scale.log2() + 127).to(torch.uint8) if scheme == "mxfp8" else scale
        if scheme == "fp8-static":
            stored[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.5)
    settings: dict[str, Any] = {
        "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]},
        "fp8-static": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [16, 16]},
        "mxfp8": {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32]},
    }[scheme]
    return _store(folder, stored, settings)


def _store(folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return say_quantised(folder, settings)


def say_quantised(folder: Path, settings: dict[str, Any], key: str = "quantization_config") -> Path:
    """Have a folder's configuration name a scheme."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: settings}))
    return folder


def _mxfp4(folder: Path) -> Path:
    config = transformers.GptOssConfig(
        **{**SIZES, "intermediate_size": 32}, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        layer_types=["sliding_attention", "full_attention"], sliding_window=16,
    )  # fmt: skip
    _save(transformers.GptOssForCausalLM(config), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, high, wide = tensors.pop(name).shape  # (experts, in, out)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, wide, high // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, wide, high // 32), 124, dtype=torch.uint8)
    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return _store(folder, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": plain})


def _four_bits(folder: Path) -> Path:
    plain = folder.with_name(f"{folder.name}-before")
    sizes = {**SIZES, "hidden_size": 128, "intermediate_size": 256}
    _save(transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)), plain)
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def as_transformers_reads(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A model of a folder by transformers alone, as plain weights."""
    config = transformers.AutoConfig.from_pretrained(folder)
    scheme = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    more: dict[str, Any] = {}
    if scheme in ("fp8", "mxfp8"):
        more["quantization_config"] = transformers.FineGrainedFP8Config(dequantize=True)
    if scheme == "mxfp4":
        more["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **more)
    except ValueError:
        model = transformers.AutoModelForMultimodalLM.from_pretrained(folder, dtype=dtype, **more)
    return (model.dequantize(dtype) if scheme == "bitsandbytes" else model).eval()
