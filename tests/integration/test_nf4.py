"""A base of four bits: the frozen stack lives beside it, the adapter is whole, and nothing else changes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file
from tiny_registry import CHAT
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from stackctl.engine.base.loading import load_weights


@pytest.fixture(autouse=True, params=[True, False], ids=["AVX512-BF16", "another CPU"])
def packing_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What bitsandbytes sees of the CPU: whether it would pack weights that are multiplied without gradients."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: request.param)
    return request.param


def quantised(base: Any) -> Any:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config).eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it cannot pack rows of 32 weights
    return model


def test_training_on_a_base_of_four_bits_has_the_stack_live(h: Any) -> None:
    style = h.add("style", seed=1, scale=0.2)
    before = h.bytes_of("style")
    alone = oracle.loss(quantised(h.base), CHAT)
    active = oracle.loss(PeftModel.from_pretrained(quantised(h.base), style).eval(), CHAT)
    whole = oracle.loss(oracle.live(h.base, (style, 1.0)), CHAT)
    report = h.train("new", "--dtype", "nf4", "--max-steps", 8, on="style")
    curve = [point["loss"] for point in h.log("new")]
    assert curve[0] == pytest.approx(active, rel=1e-4), "style is active on the quantised base"
    assert abs(active - alone) > 0.003 * active
    assert abs(active - whole) > 1e-3 * active, "four bits are not the base itself"
    assert curve[-1] < 0.99 * curve[0]
    assert report["frozen"] == "live"
    entry = h.run("inspect", "new", "--json").json
    assert entry["run"]["dtype"] == "nf4, float32"
    saved = load_file(h.weights("new") / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert h.bytes_of("style") == before
    both = PeftModel.from_pretrained(quantised(h.base), style, adapter_name="style")
    both.load_adapter(h.weights("new"), adapter_name="new")
    oracle.activate(both, ["style", "new"])
    assert oracle.loss(both.eval(), CHAT) < curve[-1], "plain PEFT loads it on such a base"


def test_gradients_go_through_weights_that_were_evaluated(packing_cpu: bool, tmp_path: Path) -> None:
    """Rows of 128 weights can be packed, and then have no backward pass."""
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(tmp_path)
    model = load_weights(tmp_path, torch.float32, torch.device("cpu"), four_bits=True).eval()
    embedded = torch.randn(1, 3, 128, requires_grad=True)
    with torch.no_grad():
        evaluated = model(inputs_embeds=embedded).logits
    trained = model.train()(inputs_embeds=embedded).logits
    assert torch.allclose(trained, evaluated, rtol=1e-5, atol=1e-6)
    (found,) = torch.autograd.grad(trained.square().sum(), embedded)
    plain = model.dequantize(torch.float32)(inputs_embeds=embedded).logits
    assert torch.allclose(trained, plain, rtol=1e-4, atol=1e-6)
    (wanted,) = torch.autograd.grad(plain.square().sum(), embedded)
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_a_run_on_four_bits_is_resumed(h: Any) -> None:
    options = ("--dtype", "nf4", "--max-steps", 4, "--save-steps", 2)
    h.train("whole", *options)

    def interrupt() -> None:
        raise KeyboardInterrupt

    h.at_step(3, interrupt)
    h.train("new", *options, code=130)
    h.at_step(0, interrupt)
    h.train("new", *options, "--resume")
    assert h.bytes_of("new")["adapter_model.safetensors"] == h.bytes_of("whole")["adapter_model.safetensors"]


def test_what_four_bits_cannot_do_is_told_at_once(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    h.add("style", seed=1)
    error = h.train("new", "--dtype", "nf4", "--frozen", "fold", on="style", code=4)["error"]
    assert "--frozen fold" in error["hint"]
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )
    error = h.train("new", "--dtype", "nf4", code=4)["error"]
    assert error["hint"] == "pip install 'stackctl-lora[quant]'"
    assert h.adapters() == {"style"}
