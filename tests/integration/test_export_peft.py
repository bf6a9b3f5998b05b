"""A stack exported as one plain LoRA: PEFT loads it and gets what all members live give."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

from stackctl.engine import algebra
from stackctl.engine.tensors import MemberTensors

ARCHITECTURES = ["llama", "tied", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "phi3", "neox", "mixtral"]


def export(h: Any, what: str, out: str, *options: object, code: int = 0) -> Any:
    return h.run("export", what, "--format", "peft", "--out", h.folder / out, *options, "--json", code=code)


def loaded(h: Any, folder: Path) -> Any:
    """Plain PEFT with the exported adapter, in float64; every tensor of the file has found its place."""
    model = PeftModel.from_pretrained(oracle.load_plain(h.base), folder)
    found = {name.replace(".default", "") for name, _ in model.named_parameters() if "lora_" in name}
    written = {name for name in load_file(folder / "adapter_model.safetensors") if "lora_" in name}
    assert found == written
    return model.double().eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_gets_the_whole_stack(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    targets = {"target_modules": ["q_proj", "o_proj"]} if name == "mixtral" else {}
    h.add("style", seed=1, **targets)
    h.add("instruct", seed=2, r=3, lora_alpha=5, use_rslora=True, **targets)
    report = export(h, "style:0.5+instruct:-0.7", "out").json
    model = loaded(h, h.folder / "out")
    wanted = h.live(("style", 0.5), ("instruct", -0.7))
    error = oracle.relative(oracle.logits(model), wanted, h.live())
    assert error < 1e-5
    assert report["rank"] == 7
    assert report["exact"] is True
    assert report["max_relative_error"] < 1e-6
    assert all(layer.scaling["default"] == 1 for layer in model.modules() if isinstance(layer, LoraLayer))
    files = {file["path"]: file for file in report["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    for path, file in files.items():
        content = (h.folder / "out" / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "disjoint modules of unlike ranks": ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"], "r": 9}),
    "patterns": (
        {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"v_proj": 1}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    ),
    "embedding and head": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ),
}


@pytest.mark.parametrize("base", ["llama", "tied"])
@pytest.mark.parametrize("case", CASES)
def test_every_layout(tiny_registry: Any, base: str, case: str) -> None:
    h = tiny_registry(base)
    style, instruct = CASES[case]
    h.add("style", seed=1, **style)
    h.add("instruct", seed=2, **instruct)
    export(h, "style+instruct:0.3", "out")
    error = oracle.relative(
        oracle.logits(loaded(h, h.folder / "out")), h.live(("style", 1), ("instruct", 0.3)), h.live()
    )
    assert error < 1e-5
    h.run("add", "again", h.folder / "out")
    assert h.error(h.load(), "again", ("style", 1), ("instruct", 0.3)) < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_rounding_costs_is_reported(h: Any, dtype: str) -> None:
    h.add("style", seed=1)
    h.add("instruct", seed=2, r=2)
    report = export(h, "style+instruct:2", "out", "--dtype", dtype).json
    exact = oracle.added(oracle.deltas(h.paths["style"]), oracle.deltas(h.paths["instruct"], 2.0))
    config = json.loads((h.folder / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 6
    found = oracle.deltas(h.folder / "out")
    worst = max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)
    assert report["max_relative_error"] == pytest.approx(worst, rel=1e-3)
    assert 1e-5 < worst < 1e-2
    assert report["exact"] is False
    tensors = load_file(h.folder / "out" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failed_export_leaves_nothing(h: Any, value: float) -> None:
    h.add("style", seed=1)
    path = h.add("spare", seed=2)
    tensors = load_file(path / "adapter_model.safetensors")
    list(tensors.values())[-1][0, 0] = value
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    h.run("add", "sick", path, code=None)
    before = {p.name for p in h.folder.iterdir()}
    failed = export(h, "style+sick", "out", code=5)
    assert failed.json["error"]["code"] == "verification_failed"
    assert {p.name for p in h.folder.iterdir()} == before, "no --out, and nothing beside it"


def test_what_does_not_fit_float16_is_5(h: Any) -> None:
    h.add("huge", seed=1, scale=3e5)
    before = {p.name for p in h.folder.iterdir()}
    export(h, "huge", "out", "--dtype", "float16", code=5)
    assert {p.name for p in h.folder.iterdir()} == before
    export(h, "huge", "out")


def test_tampered_taken_and_empty(h: Any) -> None:
    h.add("style", seed=1)
    export(h, "style", "out")
    kept = (h.folder / "out" / "adapter_model.safetensors").read_bytes()
    export(h, "style:0.5", "out", code=2)
    assert (h.folder / "out" / "adapter_model.safetensors").read_bytes() == kept
    export(h, "style:0", "none", code=4)
    file = h.weights("style") / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 64
    file.write_bytes(bytes(data))
    export(h, "style", "tampered", code=5)
    assert not (h.folder / "tampered").exists()
    assert not (h.folder / "none").exists()


def test_the_exported_weights_are_used_in_half_precision_too(h: Any) -> None:
    """The scale is shared over both factors, so that neither loses range where it is rounded."""
    h.add("style", seed=1, lora_alpha=4000, scale=0.01)
    export(h, "style", "out", "--dtype", "float16")
    tensors = load_file(h.folder / "out" / "adapter_model.safetensors")
    sizes = [float(tensor.float().abs().max()) for tensor in tensors.values()]
    assert max(sizes) / min(sizes) < 100
    assert torch.isfinite(oracle.logits(loaded(h, h.folder / "out"))).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_exact_sum_is_the_algebras_bit_for_bit(h: Any, dtype: torch.dtype) -> None:
    """It is written by other means, without torch, from whatever the members are stored in."""
    path = h.add("style", seed=1, target_modules=["q_proj", "embed_tokens"])
    stored = {n: t.to(dtype) for n, t in load_file(path / "adapter_model.safetensors").items()}
    save_file(stored, path / "adapter_model.safetensors", {"format": "pt"})
    h.run("add", "stored", path)
    h.add("instruct", seed=2, r=3, use_rslora=True, target_modules=["q_proj", "v_proj"])
    export(h, "stored:-0.3+instruct", "out")
    found = load_file(h.folder / "out" / "adapter_model.safetensors")
    plan = h.plan("stored:-0.3+instruct")
    assert len(found) == 2 * len(plan.modules)
    with MemberTensors(plan) as tensors:
        for name, module in plan.modules.items():
            kind = "lora_embedding_{}" if module.type == "Embedding" else "lora_{}.weight"
            for part, wanted in zip("AB", algebra.concatenate(tensors.factors(module)), strict=True):
                assert torch.equal(found[f"base_model.model.{name}.{kind.format(part)}"], wanted)


def test_what_does_not_fit_float32_is_5(h: Any) -> None:
    h.add("huge", seed=1, scale=1e38)
    before = {p.name for p in h.folder.iterdir()}
    failed = export(h, "huge:100", "out", code=5)
    assert "do not fit float32" in failed.json["error"]["message"]
    assert {p.name for p in h.folder.iterdir()} == before


def test_the_exact_sum_needs_no_torch(h: Any) -> None:
    h.add("style", seed=1)
    h.add("instruct", seed=2)
    program = "import sys\nfrom stackctl.cli import main\ntry:\n  main()\nfinally:\n  print(*sys.modules)"
    command = ["export", "style+instruct:0.5", "--out", str(h.folder / "out"), "-q"]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=True)
    assert (h.folder / "out" / "adapter_config.json").is_file()
    assert "stackctl.engine.export.peft" in done.stdout.split()
    assert not {"torch", "peft", "transformers", "safetensors"} & set(done.stdout.split())
