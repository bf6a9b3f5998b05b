"""Every option of the installed PEFT's LoraConfig, each with a value of its own: the sum is PEFT's, or it is refused.

Adapters are made by PEFT itself, with random factors; the truth is PEFT with the adapter live.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import config as lora_configs
from tiny import random_adapter
from tiny_registry import disturb

EMBEDDINGS = {"modules_to_save": ["embed_tokens"]}
RIGHT: dict[str, list[dict[str, Any]]] = {
    "r": [{"r": 3}],
    "lora_alpha": [{"lora_alpha": 5}],
    "target_modules": [{"target_modules": r".*layers\.1\..*proj"}, {"target_modules": ["embed_tokens", "lm_head"]}],
    "exclude_modules": [{"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_proj"]}],
    "lora_dropout": [{"lora_dropout": 0.5}],
    "fan_in_fan_out": [{"fan_in_fan_out": True}],
    "bias": [{"bias": "all"}, {"bias": "lora_only"}],
    "use_rslora": [{"use_rslora": True}],
    "modules_to_save": [{"modules_to_save": ["lm_head"]}, EMBEDDINGS],
    "init_lora_weights": [{"init_lora_weights": how} for how in (False, "gaussian", "orthogonal")],
    "layers_to_transform": [{"target_modules": ["q_proj"], "layers_to_transform": [1]}],
    "layers_pattern": [{"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}],
    "rank_pattern": [{"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp.*": 6}}],
    "alpha_pattern": [{"alpha_pattern": {"q_proj": 3, "layers.0.mlp.down_proj": 20}}],
    "trainable_token_indices": [{"trainable_token_indices": [1, 2]}],
    "target_parameters": [{"target_modules": [], "target_parameters": ["q_proj.weight"]}],
    "inference_mode": [{"inference_mode": True}],
    "revision": [{"revision": "v1"}],
    "qalora_group_size": [{"qalora_group_size": 8}],
    "loftq_config": [{"loftq_config": {"loftq_bits": 8}}],
    "task_type": [{"task_type": None}, {"task_type": "SEQ_2_SEQ_LM"}],
    "runtime_config": [{"runtime_config": lora_configs.LoraRuntimeConfig(ephemeral_gpu_offload=True)}],
    "ensure_weight_tying": [{"ensure_weight_tying": True}],
}
"""Options with values whose sum is PEFT's own."""

REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "init_lora_weights": [({"init_lora_weights": how}, how) for how in ("pissa", "pissa_niter_2", "olora")],
    "use_dora": [({"use_dora": True}, "DoRA")],
    "lora_bias": [({"lora_bias": True}, "lora_bias")],
    "alora_invocation_tokens": [({"alora_invocation_tokens": [1, 2]}, "activated LoRA")],
    "layer_replication": [({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication")],
    "ensure_weight_tying": [(EMBEDDINGS | {"ensure_weight_tying": True}, "ensure_weight_tying")],
    "task_type": [({"task_type": "SEQ_CLS"}, "classifies texts")],
}
"""Options with values that make a sum wrong, and the name by which they are refused."""

EDITED: list[tuple[str, Any, str]] = [
    ("use_qalora", True, "QA-LoRA"),
    ("use_bdlora", {"nblocks": 2, "target_modules_bd_a": ["q_proj"]}, "block-diagonal"),
    ("arrow_config", {"arrow_top_k": 2}, "arrow_config"),
    ("kasa_config", {"beta": 1e-4}, "KaSA"),
    ("monteclora_config", {"num_samples": 4}, "MonteCLoRA"),
    ("init_lora_weights", "corda", "corda"),
    ("init_lora_weights", "loftq", "loftq"),
    ("init_lora_weights", "lora_ga", "lora_ga"),
]
"""Options that want a package, a scheme or data; their key stands in a plain LoRA's configuration."""

HARMLESS: list[tuple[str, Any]] = [
    ("megatron_config", {"tensor_model_parallel_size": 1}),
    ("megatron_core", "megatron.other"),
    ("eva_config", {"rho": 3.0}),
    ("corda_config", {"corda_method": "kpm"}),
    ("lora_ga_config", {"direction": "ArB2r"}),
    ("velora_config", {"num_groups": 4}),
    ("auto_mapping", {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}),
    ("peft_version", "0.99.0"),
    ("base_model_name_or_path", "somebody/else"),
    ("init_lora_weights", "eva"),
    ("init_lora_weights", "mica"),
]
"""What says how an adapter was trained, or where it came from: with it in the configuration the sum is the same."""

NEITHER = {"peft_type"}
"""Another test's."""


def made(base: Path, out: Path, options: dict[str, Any]) -> Path:
    random_adapter(base, out, **options)
    if {"modules_to_save", "bias", "trainable_token_indices"} & set(options):
        disturb(out)
    return out


def edited(base: Path, out: Path, key: str, value: Any) -> Path:
    file = random_adapter(base, out) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    return out


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(case, id=f"{key} {i}") for key, found in table.items() for i, case in enumerate(found)]


@pytest.mark.parametrize("options", cases(RIGHT))
def test_what_peft_does_with_it_is_what_is_done_here(
    tiny_registry: Callable[..., Any], options: dict[str, Any]
) -> None:
    tiny = tiny_registry("tied" if "ensure_weight_tying" in options else "qwen2" if "bias" in options else "llama")
    path = made(tiny.base, tiny.folder / "theirs", options)
    tiny.run("add", "x", path, "--base", "tiny")
    tiny.paths["x"] = path
    assert tiny.error(tiny.load(), "x", ("x", 1.0)) < 1e-5
    assert float((tiny.live(("x", 1.0)) - tiny.live()).abs().max()) > 1e-3, "without effect nothing is shown"


@pytest.mark.parametrize("more", [EMBEDDINGS, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_tying_that_is_asked_for_where_nothing_is_tied_does_nothing(
    tiny_registry: Callable[..., Any], more: dict[str, Any]
) -> None:
    tiny = tiny_registry("llama")
    path = tiny.paths["x"] = made(tiny.base, tiny.folder / "theirs", more | {"ensure_weight_tying": True})
    tiny.run("add", "x", path, "--base", "tiny")
    assert tiny.error(tiny.load(), "x", ("x", 1.0)) < 1e-5


@pytest.mark.parametrize("case", cases(REFUSED))
def test_what_cannot_be_summed_is_refused_by_name(
    tiny_registry: Callable[..., Any], case: tuple[dict[str, Any], str]
) -> None:
    options, name = case
    tiny = tiny_registry("tied" if name == "ensure_weight_tying" else "llama")
    path = made(tiny.base, tiny.folder / "theirs", options)
    error = tiny.run("add", "x", path, "--base", "tiny", "--json", code=4).json["error"]
    assert name in error["message"]
    assert error["hint"]
    assert not tiny.adapters()


@pytest.mark.parametrize(("key", "value", "name"), EDITED)
def test_other_kinds_of_lora_are_refused_by_name(
    tiny_registry: Callable[..., Any], key: str, value: Any, name: str
) -> None:
    tiny = tiny_registry("llama")
    path = edited(tiny.base, tiny.folder / "theirs", key, value)
    assert name in tiny.run("add", "x", path, "--base", "tiny", "--json", code=4).json["error"]["message"]


def test_what_tells_only_how_it_was_trained_changes_nothing(tiny_registry: Callable[..., Any]) -> None:
    tiny = tiny_registry("llama")
    plain = random_adapter(tiny.base, tiny.folder / "plain")
    tiny.paths["plain"] = plain
    tiny.run("add", "plain", plain)
    stacked = tiny.load()
    wanted = tiny.logits(stacked, "plain")
    assert tiny.error(stacked, "plain", ("plain", 1.0)) < 1e-5
    for index, (key, value) in enumerate(HARMLESS):
        name = f"x{index}"
        tiny.run("add", name, edited(tiny.base, tiny.folder / name, key, value), "--base", "tiny")
        assert torch.equal(tiny.logits(stacked, name), wanted), key


def test_every_option_is_looked_at() -> None:
    """A newer PEFT's options have to be put into one of the tables."""
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    assert fields == {*RIGHT, *REFUSED, *NEITHER, *(edit[0] for edit in (*EDITED, *HARMLESS))}
