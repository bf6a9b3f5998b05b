"""``add --convert`` of rarer LoRAs, by what PEFT makes of each: block-diagonal factors, biases in B, CorDA."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from adapter_kinds import TARGETS, load_live, make_adapter
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import BdLoraConfig
from peft.tuners.lora.config import CordaConfig
from transformers import AutoModelForCausalLM


def fresh(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base)


def refused_with_the_command(h: Any, path: Path) -> None:
    assert f"stackctl add x {path} --convert" in h.run("add", "x", path, code=4).err


def test_a_block_diagonal_lora(h: Any) -> None:
    path = h.folder / "made"
    blocks = BdLoraConfig(target_modules_bd_a=["q_proj", "v_proj"], target_modules_bd_b=["down_proj"], nblocks=2)
    make_adapter(fresh(h.base), LoraConfig(r=4, target_modules=TARGETS, use_bdlora=blocks, task_type="CAUSAL_LM"), path)
    refused_with_the_command(h, path)
    made = h.run("add", "x", path, "--convert", "--json").json
    assert (made["converted"]["from"], made["rank"]) == ("BDLORA", 4)
    assert made["converted"]["relative_error"] < 1e-6
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-4


def test_a_bias_in_b(tiny_registry: Any) -> None:
    """It goes into the biases of a base that has some; a base without any has no place for it."""
    h = tiny_registry("qwen2")
    path = h.folder / "made"
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_bias=True, task_type="CAUSAL_LM")
    make_adapter(fresh(h.base), config, path)
    refused_with_the_command(h, path)
    made = h.run("add", "x", path, "--convert", "--json").json
    assert made["converted"]["from"] == "LORA_BIAS"
    live, plain = oracle.logits(load_live(h.base, path)), oracle.logits(fresh(h.base))
    assert oracle.relative(h.logits(h.load(), "x"), live, plain) < 1e-4
    assert oracle.relative(oracle.logits(load_live(h.base, h.weights("x"))), live, plain) < 1e-4


def test_a_bias_in_b_where_the_base_has_none(h: Any) -> None:
    path = h.folder / "made"
    make_adapter(fresh(h.base), LoraConfig(r=4, target_modules=["q_proj"], lora_bias=True, task_type="CAUSAL_LM"), path)
    error = h.run("add", "x", path, "--convert", "--json", code=4).json["error"]
    assert "bias" in error["message"] and "--convert" not in error["hint"]
    assert h.adapters() == set()


@pytest.mark.parametrize("method", ["kpm", "ipm"])
def test_corda_as_peft_begins_it(tiny_registry: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A residual base by the covariance of data, which no configuration tells: the adapter as it began does."""
    monkeypatch.setitem(
        sys.modules, "attr", dataclasses
    )  # PEFT takes ``dataclass`` from a package that it does not ask for
    from peft.tuners.lora.corda import preprocess_corda

    h = tiny_registry()
    model = fresh(h.base)
    corda = CordaConfig(corda_method=method)
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="corda", corda_config=corda, task_type="CAUSAL_LM"
    )
    preprocess_corda(model, config, run_model=lambda: model(oracle.TOKENS))
    live = get_peft_model(model, config)
    before, after = h.folder / "before", h.folder / "after"
    live.peft_config["default"].init_lora_weights = True
    live.save_pretrained(before)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in live.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    live.peft_config["default"].init_lora_weights = "corda"
    live.save_pretrained(after)
    told = json.loads((after / "adapter_config.json").read_text())
    assert told["init_lora_weights"] == "corda"
    assert "--convert --initial" in h.run("add", "x", after, code=4).err
    made = h.run("add", "x", after, "--convert", "--initial", before, "--json").json
    assert (made["rank"], made["converted"]["from"]) == (8, "CORDA")
    wanted, plain = oracle.logits(live.eval()), oracle.logits(fresh(h.base))
    assert oracle.relative(h.logits(h.load(), "x"), wanted, plain) < 1e-4
    assert oracle.relative(oracle.logits(load_live(h.base, h.weights("x"))), wanted, plain) < 1e-4
