"""``base add FILE.gguf``: what transformers passes over in a GGUF file is read, or the file is refused for it.

Each file is written from a model of transformers', whose logits the base has to have.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SIZES
from tiny_gguf import LETTERS, write_gguf
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from stackctl.engine.base.gguf_conversion import reading_once
from stackctl.engine.base.gguf_facts import take_splits
from stackctl.engine.models import load_base
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_models import embedded_gguf
from stackctl.registry.store import Registry

TOKENS = torch.arange(3, 260)[None] * 7 % 250
"""(1, 257): longer than any window and any original context here."""
SMALL = {**SIZES, "vocab_size": len(LETTERS) + 4}
ORIGINAL = {"rope.scaling.original_context_length": 64}
LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [1.0, 3.0, 9.0, 27.0]}


def llama_3_frequencies(base: float, head: int, factor: float) -> list[float]:
    """As llama.cpp writes them (conversion/llama.py, ``generate_extra_tensors``)."""
    made = []
    for number in range(head // 2):
        wave = 2 * math.pi * base ** (2 * number / head)
        smooth = (8192 / wave - 1) / (4 - 1)
        own = 1 / ((1 - smooth) / factor + smooth)
        made.append(1.0 if wave < 8192 / 4 else factor if wave > 8192 else own)
    return made


def rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0, **more}


LLAMA_3 = rope(
    rope_type="llama3", rope_theta=500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
READ: dict[str, tuple[str, Any, Any, dict[str, Any], dict[str, Any]]] = {
    "Llama 3": (
        "llama", LlamaForCausalLM, LlamaConfig(**{**SMALL, "hidden_size": 64}, rope_parameters=LLAMA_3),
        {}, {"rope_freqs.weight": llama_3_frequencies(500_000.0, 16, 32.0)},
    ),
    "tied": ("llama", LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True), {}, {}),
    "linear": (
        "llama", LlamaForCausalLM, LlamaConfig(**SMALL, rope_parameters=rope(rope_type="linear", factor=4.0)),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {},
    ),
    "YaRN": (
        "qwen2", Qwen2ForCausalLM,
        Qwen2Config(
            **SMALL, rope_parameters=rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
        ),
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, **ORIGINAL}, {},
    ),
    "a window": (
        "phi3", Phi3ForCausalLM, Phi3Config(**SMALL, sliding_window=24), {"attention.sliding_window": 24}, {}
    ),
    "part of a head": (
        "phi3", Phi3ForCausalLM, Phi3Config(**SMALL, rope_parameters=rope(partial_rotary_factor=0.5)), {}, {}
    ),
    "long texts": (
        "phi3", Phi3ForCausalLM,
        Phi3Config(
            **SMALL, original_max_position_embeddings=64,
            rope_parameters=rope(rope_type="longrope", original_max_position_embeddings=64, **LONG),
        ),
        {"rope.scaling.attn_factor": math.sqrt(1 + math.log(512 / 64) / math.log(64)), **ORIGINAL},
        {f"rope_factors_{name.split('_')[0]}.weight": values for name, values in LONG.items()},
    ),
    "heads of another width": (
        "qwen3", Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=16),
        {"attention.key_length": 16, "attention.value_length": 16}, {},
    ),
    "other positions and widths": (
        "gpt2", GPT2LMHeadModel, GPT2Config(n_positions=300, n_embd=32, n_layer=2, n_head=4, n_inner=96,
        vocab_size=SMALL["vocab_size"]), {}, {},
    ),
    "another base of the angles": (
        "starcoder2", Starcoder2ForCausalLM,
        Starcoder2Config(**SMALL, rope_parameters=rope(rope_theta=999_999.0), sliding_window=24),
        {"attention.sliding_window": 24}, {},
    ),
    "both": (
        "stablelm", StableLmForCausalLM,
        StableLmConfig(**SMALL, rope_parameters=rope(rope_theta=50_000.0, partial_rotary_factor=0.5)), {}, {},
    ),
}  # fmt: skip


def made(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=TOKENS).logits.double()


@pytest.mark.parametrize("case", READ)
def test_the_base_is_the_model_that_was_written(run: Any, tmp_path: Path, case: str) -> None:
    architecture, kind, config, facts, extra = READ[case]
    model = made(kind, config)
    wanted = logits(model)
    run("init")
    run("base", "add", "tiny", write_gguf(tmp_path / "tiny.gguf", architecture, model, facts, extra))
    registry = Registry(tmp_path / "registry")
    found = logits(load_base(resolve_base(registry, "tiny"), registry, dtype="float32").model)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


@pytest.fixture(scope="module")
def split_as_learned(smollm2_tokenizer: Any) -> Any:
    """The real model's tokenizer with the splits of its file, which has 49,152 tokens to read."""
    tokenizer, file = copy.deepcopy(smollm2_tokenizer), embedded_gguf()
    assert file
    with reading_once():
        assert list(take_splits(tokenizer, file)) == []
    return tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello world! 123", [19556, 905, 17, 216, 33, 34, 35]),
        ("  multiple   spaces", [216, 2701, 256, 5600]),
        ("a  12", 4),
        ("x\n\n12", 4),
        ("\t\t5", 2),
        ("ab   12  3", 6),
    ],
)
def test_text_is_split_as_the_vocabulary_was_learned(split_as_learned: Any, text: str, ids: list[int] | int) -> None:
    """The ids, or how many they are, that llama.cpp makes of it with the real model's file."""
    found = split_as_learned(text)["input_ids"]
    assert ids in (found, len(found))


def test_splits_that_are_not_known_are_named(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    def splits(pre: str) -> tuple[list[str], list[str]]:
        file = write_gguf(tmp_path / f"{pre}.gguf", "llama", made(LlamaForCausalLM, LlamaConfig(**SMALL)), pre=pre)
        tokenizer = copy.deepcopy(smollm2_tokenizer)
        told = list(take_splits(tokenizer, file))
        return told, [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("I'M 12!\n\n")]

    assert splits("gpt-2") == ([], ["I", "'", "M", "Ġ12", "!", "ĊĊ"])
    assert splits("stablelm2") == ([], ["I", "'M", "Ġ", "1", "2", "!ĊĊ"])
    assert splits("deepseek-coder")[0] == ["how it splits text (deepseek-coder) is not read from GGUF"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"left_out": ["blk.1.ffn_up.weight"]}, "it lacks model.layers.1.mlp.up_proj.weight"),
        ({"extra": {"blk.0.attn_q.bias": [0.1] * 32}}, "transformers reads nothing of blk.0.attn_q.bias"),
        ({"extra": {"rope_freqs.weight": [1.0, 2.0, 3.0, 5.0]}}, "are not those of Llama 3"),
        ({"extra": {"rope_factors_long.weight": [1.0] * 4}}, "rotary factors for long texts"),
        ({"facts": {"attention.key_length": 16}}, "q_proj.weight has the shape [32, 32], and by what it says"),
        ({"facts": {"rope.scaling.type": "longrope"}}, "scaled (longrope)"),
        ({"facts": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}}, "scaled (yarn)"),
    ],
)
def test_what_is_not_read_is_refused_by_name(run: Any, tmp_path: Path, change: Any, said: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", "llama", made(LlamaForCausalLM, LlamaConfig(**SMALL)), **change)
    run("init")
    assert said in run("base", "add", "tiny", file, code=4).err
    assert run("ls", "--json").json["bases"] == []
