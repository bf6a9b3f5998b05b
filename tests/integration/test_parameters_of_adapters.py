"""Adapters on what PEFT adapts or renames in its own way: parameters, and modules that it does not find again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
from adapter_kinds import make_adapter
from architectures import tiny_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from stackctl.engine.base.module_shapes import module_shapes
from stackctl.engine.base.weight_conversion import unread_names
from stackctl.engine.peft_limits import not_read_back
from stackctl.lora.naming import INDEX
from stackctl.lora.target_parameters import EXPERTS


@pytest.mark.parametrize("kind", ["mistral_large4", "deepseek_ocr2", "mixtral", "gemma3", "llava", "llama"])
def test_the_names_that_peft_loses_are_those_of_the_entry(kind: str) -> None:
    config = architectures.tiny_config(kind)
    with torch.device("meta"):
        model = architectures.model_class(config)(config)
    shapes = module_shapes(model)
    found = set(unread_names(model, shapes))
    lost, tried = set(), set()
    for name, shape in shapes.items():
        parameter = name if shape.type in EXPERTS else f"{name}.weight"
        pattern = INDEX.sub("*", name)
        if pattern in tried or shape.type == "Shared":
            continue
        tried.add(pattern)
        with torch.device("meta"):
            model = architectures.model_class(config)(config)
            live = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=[parameter]), "default")
        if not_read_back(live, "default", [name]):
            lost.add(pattern)
    assert lost == found & tried == found


def test_what_peft_does_not_find_again_is_refused(run: Any, tmp_path: Path) -> None:
    base = tiny_folder("mistral_large4", tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)

    def made(name: str, **settings: Any) -> Path:
        config = LoraConfig(r=2, **settings)
        make_adapter(AutoModelForImageTextToText.from_pretrained(base), config, tmp_path / name)
        return tmp_path / name

    experts = ["experts.gate_up_proj", "experts.down_proj", "mlp.gate.weight"]
    for number, settings in enumerate(
        [
            {"target_modules": [], "target_parameters": experts},
            {"target_modules": [], "target_parameters": experts[:1]},
            {"target_modules": [r"model.language_model.layers.1.mlp.shared_experts.up_proj"]},
        ]
    ):
        refused = run("add", f"x{number}", made(f"x{number}", **settings), code=4).err
        assert "PEFT does not find its tensors again" in refused
    layers = [f"model.language_model.layers.{n}.self_attn.o_proj" for n in range(2)]
    run("add", "fine", made("fine", target_modules=layers))


def test_by_names_of_before_peft_finds_it_and_so_does_stackctl(run: Any, tmp_path: Path) -> None:
    """PEFT renames those to today's, by which no adapter can be written."""
    base = tiny_folder("mistral_large4", tmp_path / "base")
    path = tmp_path / "made"
    config = LoraConfig(r=2, target_modules=[], target_parameters=["gate.weight"])
    make_adapter(AutoModelForImageTextToText.from_pretrained(base), config, path)
    now = load_file(path / "adapter_model.safetensors")
    old = {name.replace("model.language_model.layers.1.mlp", "layers.1"): tensor for name, tensor in now.items()}
    save_file(old, path / "adapter_model.safetensors", {"format": "pt"})
    run("init")
    run("base", "add", "tiny", base)

    def logits(folder: Path, adapter: Path | None = None) -> torch.Tensor:
        model: Any = AutoModelForImageTextToText.from_pretrained(folder)
        return oracle.logits((PeftModel.from_pretrained(model, adapter) if adapter else model).eval())

    bare, wanted = logits(base), logits(base, path)
    assert not torch.equal(bare, wanted)
    run("add", "x", path)
    run("export", "x", "--format", "model", "--out", tmp_path / "model")
    assert oracle.relative(logits(tmp_path / "model"), wanted, bare) < 1e-5
    refused = run("export", "x", "--format", "peft", "--out", tmp_path / "peft", code=4).err
    assert "PEFT does not find" in refused and "--format model" in refused


TURNED = [
    ("gpt2", "h.0.attn.c_proj.weight"), ("gpt2", "c_attn.weight"), ("gpt2", "wte.weight"),
    ("llama", "embed_tokens.weight"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "parameter"), TURNED)
def test_a_parameter_that_lies_the_other_way_round_is_refused(
    run: Any, tmp_path: Path, kind: str, parameter: str
) -> None:
    """A square one fits either way, and would be added turned."""
    base = tiny_folder(kind, tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)
    config = LoraConfig(r=2, target_modules=[], target_parameters=[parameter])
    make_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "made")
    refused = run("add", "x", tmp_path / "made", code=4).err
    assert "the other way round" in refused and "target_modules" in refused


def test_a_parameter_that_is_no_matrix_is_refused_as_that(run: Any, tmp_path: Path) -> None:
    base = tiny_folder("gpt_oss", tmp_path / "base")
    run("init")
    run("base", "add", "tiny", base)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj_bias"])
    make_adapter(AutoModelForCausalLM.from_pretrained(base), config, tmp_path / "made")
    refused = run("add", "x", tmp_path / "made", "--json", code=4).json["error"]["message"]
    assert "no matrix of tiny" in refused and "experts.down_proj_bias" in refused
    assert "does not have" not in refused and "target_modules" not in refused
