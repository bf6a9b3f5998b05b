"""A stack summed into its base: transformers loads it and gets what raw PEFT with all members live gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tiny_registry import TinyRegistry
from transformers import AutoConfig, AutoTokenizer

CASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"target_modules": ["q_proj", "embed_tokens"]},
    "gemma": {"target_modules": ["down_proj", "lm_head"]},
    "qwen2": {},
    "gpt2": {},
    "phi3": {},
    "neox": {},
    "mixtral": {"target_modules": ["q_proj", "o_proj"]},
}


def export(h: Any, what: str, *options: object, code: int = 0) -> Any:
    return h.run("export", what, "--format", "model", "--out", h.folder / "out", *options, "--json", code=code)


@pytest.mark.parametrize("name", CASES)
def test_transformers_gets_the_whole_stack(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1, **CASES[name])
    h.add("instruct", seed=2, r=3, lora_alpha=5, use_rslora=True, **CASES[name])
    report = export(h, "style:0.5+instruct:-0.7").json
    model = oracle.load_plain(h.folder / "out", torch.float64)
    wanted = h.live(("style", 0.5), ("instruct", -0.7))
    assert oracle.relative(oracle.logits(model), wanted, h.live()) < 1e-5
    assert report["exact"] is True
    assert report["max_relative_error"] < 1e-5


def test_tied_embeddings_stay_tied_unless_one_is_touched(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    h.add("plain", seed=1, target_modules=["q_proj"])
    export(h, "plain")
    assert AutoConfig.from_pretrained(h.folder / "out").tie_word_embeddings is True
    h.add("embedding", seed=2, target_modules=["embed_tokens"])
    h.run("export", "embedding", "--format", "model", "--out", h.folder / "untied")
    assert AutoConfig.from_pretrained(h.folder / "untied").tie_word_embeddings is False


@pytest.mark.parametrize(("kind", "target"), [("zamba", "embed_tokens"), ("bert", "word_embeddings")])
def test_what_else_is_tied_is_there_when_embeddings_are_untied(
    kind: str, target: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A configuration unties all or nothing: the layers that Zamba shares, the head's bias of BERT."""
    base = tmp_path / "tiny"
    model = architectures.tiny_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    h = TinyRegistry(run, base, tmp_path, monkeypatch)
    h.add("embedding", seed=2, target_modules=[target])
    assert export(h, "embedding").json["max_relative_error"] < 1e-6
    made = oracle.load_plain(h.folder / "out")
    assert oracle.relative(oracle.logits(made), h.live(("embedding", 1.0)), h.live()) < 1e-5
    assert made.config.tie_word_embeddings is False


def test_shards_stay_shards(h: Any, models: Any, tmp_path: Path) -> None:
    model = oracle.load_plain(models("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(models("llama")).save_pretrained(tmp_path / "sharded")
    h.run("base", "add", "sharded", tmp_path / "sharded")
    path = h.add("style", seed=1)
    h.run("add", "other", path, "--base", "sharded")
    export(h, "other")
    written = sorted(p.name for p in (h.folder / "out").glob("*.safetensors"))
    assert written == sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(written) > 2
    again = oracle.load_plain(h.folder / "out", torch.float64)
    assert oracle.relative(oracle.logits(again), h.live(("style", 1.0)), h.live()) < 1e-5


def test_tokenizer_and_configuration_come_along_and_no_pickle(h: Any) -> None:
    h.add("style", seed=1)
    export(h, "style")
    tokenizer = AutoTokenizer.from_pretrained(h.folder / "out")
    assert tokenizer.chat_template
    assert (h.folder / "out" / "generation_config.json").is_file()
    assert not [*(h.folder / "out").glob("adapter_*")]


def test_half_precision_is_rounded_once_and_the_loss_is_told(h: Any) -> None:
    """Every weight is the exact sum's nearest neighbour, and the reported error is the one measured here."""
    h.add("style", seed=1, scale=0.02)
    h.add("instruct", seed=2, scale=0.02)
    report = export(h, "style+instruct", "--dtype", "bfloat16").json
    written = load_file(h.folder / "out" / "model.safetensors")
    base = load_file(h.base / "model.safetensors")
    worst = 0.0
    for plan in h.plan("style+instruct").modules.values():
        delta = oracle.exact_delta([(h.paths["style"], 1.0), (h.paths["instruct"], 1.0)], plan.name)
        name = f"{plan.name}.weight"
        assert torch.equal(written[name], (base[name].double() + delta).float().bfloat16()) or (
            (written[name].double() - base[name].double() - delta).abs().max() <= 2**-8 * base[name].abs().max()
        )
        worst = max(worst, float((written[name].double() - base[name].double() - delta).norm() / delta.norm()))
    assert report["max_relative_error"] == pytest.approx(worst, rel=1e-3)
    assert json.loads((h.folder / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_saved_modules_replace_the_base_s_own(h: Any) -> None:
    h.add("style", seed=1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    h.add("instruct", seed=2, target_modules=["v_proj"])
    export(h, "style+instruct")
    model = oracle.load_plain(h.folder / "out", torch.float64)
    wanted = h.live(("style", 1.0), ("instruct", 1.0))
    assert oracle.relative(oracle.logits(model), wanted, h.live()) < 1e-5


def test_values_that_are_no_numbers_leave_nothing_behind(h: Any) -> None:
    path = h.add("style", seed=1)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    h.run("add", "broken", path)
    export(h, "broken", code=5)
    assert not (h.folder / "out").exists()
    assert not [*h.folder.glob(".tmp-*")]


@pytest.mark.parametrize(
    ("weight", "dtype", "way_out"), [(1e300, "float32", "smaller weights"), (1e10, "float16", "float32")]
)
def test_what_does_not_fit_a_dtype_says_the_way_out(h: Any, weight: float, dtype: str, way_out: str) -> None:
    h.add("style", seed=1)
    out = h.folder / "out"
    error = h.run(
        "export", f"style:{weight}", "--format", "model", "--dtype", dtype, "--out", out, "--json", code=5
    ).json["error"]
    assert f"does not fit {dtype}" in error["message"] and way_out in error["hint"]
    assert not out.exists()


def test_an_existing_folder_is_not_touched(h: Any) -> None:
    h.add("style", seed=1)
    (h.folder / "out").mkdir()
    (h.folder / "out" / "mine.txt").write_text("mine")
    export(h, "style", code=2)
    assert [p.name for p in (h.folder / "out").iterdir()] == ["mine.txt"]


def test_a_sum_is_exact_in_float32_alone(h: Any) -> None:
    h.add("style", seed=1)
    assert export(h, "style").json["exact"] is True
    rounded = h.run("export", "style", "--format", "model", "--out", h.folder / "half", "--dtype", "bfloat16", "--json")
    assert rounded.json["exact"] is False


@pytest.mark.parametrize(
    ("stored", "options", "told"),
    [
        ({}, [], "float32"),
        ({"": torch.bfloat16}, [], "bfloat16"),
        ({"": torch.bfloat16, "norm": torch.float32}, [], "bfloat16+float32"),
        ({"": torch.bfloat16, "norm": torch.float32}, ["--dtype", "float16"], "float16"),
    ],
)
def test_the_precision_that_is_told_is_that_of_the_files(
    run: Any, models: Any, tmp_path: Path, stored: dict[str, torch.dtype], options: list[str], told: str
) -> None:
    """Each tensor's own, unless one is asked for: a base may store some in another."""
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    tensors = load_file(base / "model.safetensors")
    for part, dtype in stored.items():
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items() if part in name}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    h = TinyRegistry(run, base, tmp_path, pytest.MonkeyPatch())
    h.add("style", seed=1)
    ran = h.run("export", "style", "--format", "model", "--out", h.folder / "out", *options, "--json")
    dtypes = {str(t.dtype).removeprefix("torch.") for t in load_file(h.folder / "out" / "model.safetensors").values()}
    assert ran.json["dtype"] == told == "+".join(sorted(dtypes))


def test_a_method_is_measured_against_the_exact_sum(tiny_registry: Any) -> None:
    """As of the other formats, and as ``compose`` said."""
    h = tiny_registry("gpt2")
    h.add("style", seed=1, target_modules=["c_attn"], fan_in_fan_out=True)
    h.add("instruct", seed=2, target_modules=["c_attn"], fan_in_fan_out=True)
    said = h.run("compose", "style+instruct", "--name", "s", "--method", "ties", "--density", "0.4", "--json").json
    report = export(h, "s").json
    assert report["exact"] is False
    assert report["max_relative_error"] == pytest.approx(said["worst_relative_error"], rel=1e-3)
    written, base = load_file(h.folder / "out" / "model.safetensors"), load_file(h.base / "model.safetensors")
    worst = 0.0
    for name in h.plan("s").modules:
        exact = oracle.exact_delta([(h.paths["style"], 1.0), (h.paths["instruct"], 1.0)], name)
        stored = next(key for key in base if name.endswith(key.removesuffix(".weight")))
        made = (written[stored].double() - base[stored].double()).T  # GPT-2 stores (in, out)
        worst = max(worst, float((made - exact).norm() / exact.norm()))
    assert report["max_relative_error"] == pytest.approx(worst, rel=1e-3)
