"""The estimate of memory beside what a model really keeps for its backward pass."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from tiny import tiny_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stackctl.core.schema import Base
from stackctl.engine.data.examples import Example
from stackctl.engine.data.rows import collate
from stackctl.engine.loss.logits import supervised_loss
from stackctl.engine.training.fused_modules import fuse
from stackctl.engine.training.lora_sum import add_in_place
from stackctl.lora.target_modules import expand_modules, expected_targets
from stackctl.machine import resources as machine
from stackctl.machine.memory_estimate import LargestBatch, MemoryEstimate, NewAdapter, Surroundings, estimate_memory
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.store import Registry

TOLERANCE = 0.25
"""What docs/how-to/many-gpus.md promises."""
SIZES: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=1000, n_embd=128, n_layer=4, n_head=4, bos_token_id=256, eos_token_id=257),
}
TOKENS, SUPERVISED, RANK = 160, 60, 8


@pytest.fixture
def base_of(run: Any, tmp_path: Path) -> Any:
    run("init")

    def make(name: str) -> tuple[Base, Path]:
        folder = tmp_path / name
        MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIGS[name])](CONFIGS[name]).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        run("base", "add", name, folder)
        return resolve_base(Registry(tmp_path / "registry"), name), folder

    return make


def estimate(base: Base, **kind: Any) -> MemoryEstimate:
    targets = expected_targets({"target_modules": "all-linear"}, expand_modules(base.modules), base.output_embedding)
    assert targets
    adapter = NewAdapter(RANK, targets, live_rank=kind.pop("live_rank", 0))
    batch = LargestBatch(TOKENS, SUPERVISED, checkpointing=kind.pop("checkpointing", False))
    return estimate_memory(base, adapter, batch, Surroundings(**{"precision": "float32", **kind}))


def kept_for_backward(model: Any, *, autocast: bool) -> int:
    """Bytes that a forward pass keeps, each storage once, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    labels = [-100] * (TOKENS - SUPERVISED) + [5] * SUPERVISED
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
        supervised_loss(model, collate([Example([7] * TOKENS, labels)]))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    ("name", "precision"),
    [*itertools.product(CONFIGS, ["float32", "half"]), ("llama", "autocast"), ("qwen3", "autocast")],
)
def test_the_estimate_is_near_what_a_model_keeps(base_of: Any, name: str, precision: str) -> None:
    base, folder = base_of(name)
    dtype = torch.bfloat16 if precision == "half" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    fans = {"fan_in_fan_out": True} if name == "gpt2" else {}
    adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", **fans))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    found = estimate(base, precision=precision)
    linear = [module.get_base_layer() for module in adapted.modules() if isinstance(module, LoraLayer)]
    cast, head = (
        sum(layer.weight.numel() for layer in layers) * 2 if precision == "autocast" else 0
        for layers in (linear, [model.get_output_embeddings()])
    )
    assert found.base == pytest.approx(weights + cast + head, rel=0.01)
    assert found.adapter == sum(parameter.numel() * 4 for parameter in trained)
    assert found.gradients == found.adapter
    assert found.optimizer == 2 * found.adapter
    kept = kept_for_backward(adapted, autocast=precision == "autocast")
    assert found.activations == pytest.approx(kept - cast, rel=TOLERANCE)  # logits are not kept
    assert found.logits >= SUPERVISED * base.vocabulary_size * 4


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_fused_functions_keep_is_less_and_estimated_so(base_of: Any, name: str) -> None:
    base, folder = base_of(name)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted: Any = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    add_in_place(adapted)
    before = kept_for_backward(adapted, autocast=False)
    assert fuse(adapted)
    kept = kept_for_backward(adapted, autocast=False)
    assert kept < 0.75 * before
    assert estimate(base, fused=True).activations == pytest.approx(kept, rel=TOLERANCE)


def test_more_of_everything_costs_more(base_of: Any) -> None:
    base, _ = base_of("llama")
    one = estimate(base)
    assert estimate(base, precision="nf4").base < estimate(base, precision="half").base < one.base
    assert estimate(base, live_rank=16).total > one.total
    assert one.checkpointed < one.activations
    on_a_cpu = estimate(base, heap=True)
    assert on_a_cpu.total - one.total == on_a_cpu.fragmentation > 0
    assert estimate(base, heap=True, checkpointing=True).fragmentation < on_a_cpu.fragmentation
    many, each = estimate(base, processes=8), estimate(base, processes=8, sharded=True)
    assert many.total - many.libraries == one.total - one.libraries, "DDP has everything everywhere"
    assert many.libraries > one.libraries, "a process alone imports less"
    assert each.optimizer == one.optimizer // 8
    assert each.base < one.base
    assert each.loading >= one.base, "before it is sharded, the base is whole on each"
    assert replace(one, available=one.total, shared=True).fits
    assert not replace(many, available=many.total * 7, shared=True).fits
    assert replace(many, available=many.total, shared=False).fits


def test_the_dry_run_says_what_is_needed_and_whether_it_fits(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = h.data()
    one = h.run("train", "new", "--data", data, "--batch-size", 1, "--dry-run", "--json").json["memory"]
    all_ = h.run("train", "new", "--data", data, "--batch-size", 5, "--dry-run", "--json").json["memory"]
    assert one["fits"] is True
    assert one["processes"] == 1
    assert one["activations"] < all_["activations"]
    assert one["total"] == sum(
        one[key]
        for key in (
            "base",
            "adapter",
            "gradients",
            "optimizer",
            "activations",
            "backward",
            "logits",
            "fragmentation",
            "libraries",
        )
    )
    two = h.run("train", "new", "--data", data, "--num-processes", 2, "--dry-run", "--json").json["memory"]
    assert two["processes"] == 2
    monkeypatch.setattr("stackctl.engine.training.memory.main_memory", lambda: machine.Memory(1000, 1000))
    monkeypatch.setattr("stackctl.engine.training.memory.own_memory", lambda: 0)  # which grows with every test here
    told = h.run("train", "new", "--data", data, "--dry-run")
    assert "which is more than there is" in told.out
