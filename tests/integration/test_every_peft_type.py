"""Every type of adapter that the installed PEFT knows, made by PEFT itself: LoRA is taken, all else is named."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from tiny import random_adapter, save_adapter
from transformers import AutoModelForCausalLM

from stackctl.lora.convertible import CONVERTIBLE_TYPES

CONFIGS = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
PROMPT = {"num_virtual_tokens": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10, **PROJECTIONS},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1},
    "C3A": {"block_size": 16, **PROJECTIONS},
    "CARTRIDGE": PROMPT,
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
    "FOURIERFT": {"n_frequency": 10, **PROJECTIONS},
    "IA3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "MISS": {"r": 4, **PROJECTIONS},
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_tasks": 2},
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 8},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "PSOFT": {"r": 4, **PROJECTIONS},
    "ROAD": {"group_size": 16, **PROJECTIONS},
    "SHIRA": {"r": 2, **PROJECTIONS},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 16, **PROJECTIONS},
    "WAVEFT": {"n_frequency": 10, **PROJECTIONS},
}
"""What a type needs on a model this small."""


def write(kind: str, base: Path, out: Path) -> Path:
    """A checkpoint of that type on the tiny Llama."""
    torch.manual_seed(0)
    if kind == "LORA":
        return random_adapter(base, out)
    if kind == "XLORA":
        return _write_xlora(base, out)
    if kind == "ADAMSS" and not importlib.util.find_spec("sklearn"):  # which it wants
        return _write_by_hand(kind, base, out)
    try:
        config = CONFIGS[kind](task_type="CAUSAL_LM", **OPTIONS.get(kind, PROJECTIONS))
    except TypeError:
        config = CONFIGS[kind](task_type="CAUSAL_LM")
    save_adapter(get_peft_model(AutoModelForCausalLM.from_pretrained(base), config), out)
    return out


def _write_by_hand(kind: str, base: Path, out: Path) -> Path:
    """A configuration of that type beside a tensor of no meaning."""
    out.mkdir()
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 4}
    (out / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.model.norm.weight": torch.ones(32)}, out / "adapter_model.safetensors")
    return out


def _write_xlora(base: Path, out: Path) -> Path:
    """A mixture of two LoRAs with a router."""
    experts = {str(seed): str(random_adapter(base, out.parent / f"expert-{seed}", seed=seed)) for seed in range(2)}
    model = AutoModelForCausalLM.from_pretrained(base, use_cache=False)
    config = CONFIGS["XLORA"](task_type="CAUSAL_LM", hidden_size=32, adapters=experts)
    save_adapter(get_peft_model(model, config), out)
    return out


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_every_type_is_taken_or_refused_by_its_name(
    run: Callable[..., Any], registry: Path, models: Any, tmp_path: Path, kind: str
) -> None:
    folder = write(kind, models("llama"), tmp_path / "theirs")
    if kind == "LORA":
        run("add", "x", folder)
        return
    refused = run("add", "x", folder, "--base", "tiny", "--json", code=4)
    told = refused.json["error"]
    assert f"is of PEFT type {kind}, not LORA" in told["message"]
    option = f"stackctl add x {folder} --convert"
    assert (option in told["hint"]) is (kind in CONVERTIBLE_TYPES), "named where it helps, and nowhere else"
    assert "Traceback" not in refused.err
    if kind not in CONVERTIBLE_TYPES:
        asked = run("add", "x", folder, "--base", "tiny", "--convert", "--json", code=4).json["error"]
        assert kind in asked["message"] and "--convert" not in asked["hint"]
    assert not (registry / "adapters" / "x.yaml").exists()
    (problem,) = [p for p in run("inspect", folder, "--json").json["problems"] if p["severity"] == "error"]
    assert kind in problem["message"]


def test_types_that_peft_gains_are_looked_at() -> None:
    """45 in PEFT 0.21; what a newer one adds has to be made and refused as well."""
    assert len(CONFIGS) >= 45
    assert set(OPTIONS) <= set(CONFIGS)
