"""``extract`` of what is no plain linear layer: embeddings and heads, tied or not, and experts of a mixture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tiny_registry import TinyRegistry
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from tuned_models import planted, tuned_model


def everywhere(h: Any, folder: Path, tmp_path: Path) -> None:
    """The tuned model's logits: of the adapter folded, in plain PEFT, and exported as a model."""
    wanted, plain = (oracle.logits(oracle.load_plain(place)) for place in (folder, h.base))
    assert oracle.relative(h.logits(h.load(), "chat"), wanted, plain) < 1e-4
    live = PeftModel.from_pretrained(oracle.load_plain(h.base), h.weights("chat")).eval()
    assert oracle.relative(oracle.logits(live), wanted, plain) < 1e-4
    h.run("export", "chat", "--format", "model", "--out", tmp_path / "model")
    assert oracle.relative(oracle.logits(oracle.load_plain(tmp_path / "model")), wanted, plain) < 1e-4
    assert h.run("verify", "--json").json["problems"] == []


def low_rank(parameter: torch.Tensor, rank: int = 3) -> torch.Tensor:
    return (
        0.05 * torch.randn(*parameter.shape[:-1], rank) @ torch.randn(*parameter.shape[:-2], rank, parameter.shape[-1])
    )


def is_table(key: str) -> bool:
    return any(part in key for part in ("embed_tokens", "lm_head", "wte", "wpe", "embed_in", "embed_out"))


AUTO = ("--rank", "auto", "--tolerance", 1e-3)


@pytest.mark.parametrize(
    ("name", "rank"),
    [("tied", AUTO), ("gpt2", AUTO), *((name, ("--rank", 3)) for name in ("llama", "tied", "gemma", "gpt2", "neox"))],
)
def test_a_planted_change_of_embedding_and_head_comes_back(
    tiny_registry: Any, name: str, rank: tuple[object, ...], tmp_path: Path
) -> None:
    h = tiny_registry(name)

    def change(key: str, parameter: torch.Tensor) -> None:
        planted(key, parameter)
        if is_table(key):
            parameter += low_rank(parameter)

    folder = tuned_model(h, change)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, *rank, "--json").json
    assert (found["rank"], found["left_out"]) == (3, [])
    errors = h.run("inspect", "chat", "--json").json["extracted"]["errors"]
    tables = [key for key in errors if is_table(key)]
    assert len(tables) == {"gpt2": 3}.get(name, 2), "a tied pair is two pairs of factors, for PEFT adapts each alone"
    assert max(errors.values()) < 1e-5
    everywhere(h, folder, tmp_path)


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_an_embedding_whose_change_has_no_small_rank_is_kept_whole(
    tiny_registry: Any, name: str, tmp_path: Path
) -> None:
    h = tiny_registry(name)

    def change(key: str, parameter: torch.Tensor) -> None:
        planted(key, parameter)
        if is_table(key):
            parameter[:100] += 0.1 * torch.randn_like(parameter[:100])

    folder = tuned_model(h, change)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 3, "--json").json
    tables = {"gpt2": {"transformer.wte", "transformer.wpe", "lm_head"}}.get(name, {"model.embed_tokens", "lm_head"})
    assert tables <= set(found["saved"])
    assert found["left_out"] == []
    assert found["relative_error"] < 1e-5
    everywhere(h, folder, tmp_path)


def test_a_head_that_was_tied_and_is_no_more(tiny_registry: Any, tmp_path: Path) -> None:
    """The fine-tune has a head of its own, or has lost it."""
    h = tiny_registry("tied")
    model = AutoModelForCausalLM.from_pretrained(h.base)
    torch.manual_seed(3)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + low_rank(model.lm_head.weight))
        for key, parameter in model.named_parameters():
            planted(key, parameter)
    model.config.tie_word_embeddings = False
    folder = h.folder / "untied"
    model.save_pretrained(folder)
    for file in h.base.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 3, "--json").json
    assert found["left_out"] == []
    errors = h.run("inspect", "chat", "--json").json["extracted"]["errors"]
    assert "lm_head" in errors and "model.embed_tokens" not in errors
    everywhere(h, folder, tmp_path)
    h.run("base", "add", "apart", folder)
    back = h.run("extract", "back", "--base", "apart", "--tuned", h.base, "--rank", 3, "--json").json
    assert back["left_out"] == [] and back["relative_error"] < 1e-5
    assert "lm_head" in h.run("inspect", "back", "--json").json["extracted"]["errors"]


@pytest.mark.parametrize(
    ("kind", "changed", "saved", "left_out"),
    [
        ("gpt2", r"ln_\d\.weight", ["transformer.h.0.ln_1", "transformer.h.1.ln_2"], []),  # and no bias
        ("stablelm", r"norm\.bias", ["model.layers.0.input_layernorm", "model.norm"], []),  # and no weight
        ("phi", r"lm_head\.weight", ["lm_head"], []),  # whose bias stays
        ("opt", r"embed_positions", ["model.decoder.embed_positions"], []),  # PEFT takes its mask for the tokens
        ("mamba", r"mixer\.out_proj\.weight", ["backbone.layers.1.mixer.out_proj"], []),  # PEFT puts no LoRA there
        ("bert", r"predictions\.bias|LayerNorm", ["bert.embeddings.LayerNorm"], ["cls.predictions.bias"]),
    ],
)
def test_what_is_kept_whole_is_read_by_plain_peft(
    kind: str, changed: str, saved: list[str], left_out: list[str], run: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from tiny_registry import TinyRegistry

    h = TinyRegistry(run, architectures.tiny_folder(kind, tmp_path / "tiny"), tmp_path, monkeypatch)

    def change(key: str, parameter: torch.Tensor) -> None:
        if re.search(changed, key) and key not in left_out:
            parameter += 0.05 * torch.randn_like(parameter)
        elif re.search(r"(c_attn|q_proj|in_proj|query)\.weight", key):
            parameter += low_rank(parameter)

    folder = tuned_model(h, change)
    everything = tuned_model(h, lambda key, p: p.add_(0.1) if key in left_out else change(key, p), "everything")
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", everything, "--rank", 3, "--json").json
    assert (set(saved) - set(found["saved"]), found["left_out"]) == (set(), left_out)
    everywhere(h, folder, tmp_path)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "llama4_text", "qwen2_moe"])
def test_a_planted_change_of_experts_comes_back(
    kind: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored (experts, out, in), (experts, in, out), and in an order of their own; a router is a matrix."""
    from tiny_registry import TinyRegistry

    h = TinyRegistry(run, architectures.tiny_folder(kind, tmp_path / "tiny"), tmp_path, monkeypatch)

    def change(key: str, parameter: torch.Tensor) -> None:
        if parameter.ndim == 3 or key.endswith(("proj.weight", "router.weight", "gate.weight")):
            parameter += low_rank(parameter, 2)

    folder = tuned_model(h, change)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 2, "--json").json
    assert found["rank"] == 2
    assert found["left_out"] == []
    errors = h.run("inspect", "chat", "--json").json["extracted"]["errors"]
    assert sum("experts." in key for key in errors) == 4, "two parameters in each of two layers"
    assert max(errors.values()) < 1e-5
    config = json.loads((h.weights("chat") / "adapter_config.json").read_text())
    assert any("experts" in name for name in config["target_parameters"])
    everywhere(h, folder, tmp_path)


def test_experts_of_unlike_ranks_get_the_largest(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_registry import TinyRegistry

    h = TinyRegistry(run, architectures.tiny_folder("mixtral", tmp_path / "tiny"), tmp_path, monkeypatch)

    def change(key: str, parameter: torch.Tensor) -> None:
        if parameter.ndim == 3:  # none at all in the first expert
            for expert in range(1, len(parameter)):
                parameter[expert] += low_rank(parameter[expert], expert)

    folder = tuned_model(h, change)
    told = ("--rank", "auto", "--tolerance", 1e-3)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, *told, "--json").json
    assert (found["rank"], found["modules"], found["left_out"]) == (3, 4, [])
    everywhere(h, folder, tmp_path)


def test_what_only_rounding_changed_is_not_kept(h: Any) -> None:
    """A fine-tune that was saved in bfloat16: its norms and embeddings are the base's, as far as it can tell."""
    folder = tuned_model(h, lambda key, p: planted(key, p) if "proj" in key else None)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    found = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 3, "--json").json
    assert (found["saved"], found["left_out"], found["modules"]) == ([], [], 14)
    with safe_open(h.weights("chat") / "adapter_model.safetensors", "pt") as tensors:
        assert all("lora_" in key for key in tensors.keys())  # noqa: SIM118


def test_all_that_is_unlike_is_named_before_anything_is_read(h: Any, models: Any, tmp_path: Path) -> None:
    config = json.loads((h.base / "config.json").read_text())
    for name, changed, said in (
        ("words", {"vocab_size": 264}, ["264 tokens, not 260"]),
        ("wide", {"intermediate_size": 96}, ["gate_proj is Linear [96, 32], not Linear [64, 32]", "down_proj"]),
        ("deep", {"num_hidden_layers": 3}, ["model.layers.2.self_attn.q_proj is not in the base"]),
    ):
        folder = tmp_path / name
        LlamaForCausalLM(LlamaConfig(**{**config, **changed})).save_pretrained(folder)
        for file in h.base.glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / "model.safetensors").open("ab").close()
        error = h.run("extract", "chat", "--base", "tiny", "--tuned", folder, "--json", code=4).json["error"]
        assert all(part in error["message"] for part in said), error
    other = h.run("extract", "chat", "--base", "tiny", "--tuned", models("gpt2"), "--json", code=4).json["error"]
    assert "GPT2LMHeadModel" in other["message"] and "missing" in other["message"]
    assert h.adapters() == set()


def test_layers_that_peft_renames_when_it_loads_are_kept_whole(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``k_sconv.weight_proj`` of Inkling 2, which has a norm in its embedding as well: one module, kept once."""
    base = architectures.tiny_folder("inkling2_text", tmp_path / "base")
    h = TinyRegistry(run, base, tmp_path, monkeypatch)

    def change(key: str, parameter: torch.Tensor) -> None:
        if key.endswith(("q_proj.linear.weight", "weight_proj.weight", "embed_tokens.weight", "embed_norm.weight")):
            parameter += 0.1 * torch.randn_like(parameter)

    folder = tuned_model(h, change)
    found = run("extract", "chat", "--base", "tiny", "--tuned", folder, "--rank", 32, "--json").json
    assert found["left_out"] == []
    assert {name.rpartition(".")[2] for name in found["saved"]} == {"weight_proj", "embed_tokens"}
    everywhere(h, folder, tmp_path)
