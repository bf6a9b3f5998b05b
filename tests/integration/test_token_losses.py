"""The loss a chunk of tokens at a time is the loss of whole logits: values, gradients, heads of every kind."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, PhiConfig

from stackctl.engine.data.examples import Example
from stackctl.engine.data.rows import collate
from stackctl.engine.loss import token_losses as module
from stackctl.engine.loss.logits import supervised_logits, supervised_token_losses
from stackctl.engine.loss.output_head import OutputHead, find_head
from stackctl.engine.loss.token_losses import token_losses

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS = {
    "plain": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "bias": PhiConfig(**SIZES),
    "soft cap": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.05),
    "logit scale": CohereConfig(**SIZES, logit_scale=0.3),
    "logits scaling": GraniteConfig(**SIZES, logits_scaling=7.0),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens a chunk, of 96 words."""
    monkeypatch.setattr(module, "LOSS_CHUNK", 3 * 4 * SIZES["vocab_size"])


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.requires_grad_(False)


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 90, (17,), generator=torch.Generator().manual_seed(1)).tolist()
    return collate([Example(ids, [-100] * 4 + ids[4:])])


def whole(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.cross_entropy(supervised_logits(model, inputs).float(), inputs["labels"], reduction="none")


def gradients(model: Any, losses: torch.Tensor) -> list[torch.Tensor]:
    """Of a sum in which every token counts differently, as objectives on pairs make it."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return list(torch.autograd.grad((losses * torch.linspace(0.5, 2, len(losses))).sum(), trained))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "LoRA on the head"])
def test_the_chunks_come_to_the_whole(name: str, targets: list[str]) -> None:
    model = make(name)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    inputs = batch()
    found = supervised_token_losses(adapted, inputs)
    assert find_head(model, {"input_ids": inputs["input_ids"]}) is not None, "not by the way of whole logits"
    wanted = whole(adapted, inputs)
    assert torch.allclose(found.losses, wanted, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        scored = supervised_token_losses(adapted, inputs)
        likeliest = supervised_logits(adapted, inputs).argmax(-1)
    assert torch.equal(scored.losses, found.losses)
    assert scored.correct is not None
    assert torch.equal(scored.correct, likeliest == inputs["labels"])
    for one, other in zip(gradients(adapted, found.losses), gradients(adapted, wanted), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_a_cap_counts_however_small_the_logits_are_that_it_is_looked_at_with() -> None:
    model, inputs = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=8)).eval(), batch()
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.randn(model.lm_head.weight.shape) * 1e-3)
        supervised_token_losses(model, inputs)
        model.lm_head.weight.mul_(1e5)  # a stack with a LoRA on the head, folded into the same model
        found = supervised_token_losses(model, inputs).losses
        assert torch.allclose(found, whole(model, inputs), rtol=1e-5)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_under_autocast_too(targets: list[str]) -> None:
    adapted = get_peft_model(make("plain"), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    inputs = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = supervised_token_losses(adapted, inputs).losses, whole(adapted, inputs)
    assert torch.allclose(found, wanted, rtol=1e-3)
    for one, other in zip(gradients(adapted, found), gradients(adapted, wanted), strict=True):
        assert torch.allclose(one, other, atol=2e-2 * float(other.abs().max()))


def test_logits_that_something_else_is_done_to_are_asked_for_whole() -> None:
    model = make("plain")
    own = model.forward

    def shifted(*arguments: Any, **options: Any) -> Any:
        found = own(*arguments, **options)
        found.logits = found.logits + torch.arange(SIZES["vocab_size"]) / 10
        return found

    shifted.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = shifted
    inputs = batch()
    assert find_head(model, {"input_ids": inputs["input_ids"]}) is None
    assert torch.allclose(supervised_token_losses(model, inputs).losses, whole(model, inputs))


def test_looking_for_the_head_draws_no_random_number_and_leaves_the_model_in_training() -> None:
    adapted = get_peft_model(make("plain"), LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)).train()
    before = torch.get_rng_state()
    inputs = batch()
    assert find_head(adapted.get_base_model(), {"input_ids": inputs["input_ids"]}) is not None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(layer.training for layer in adapted.modules())


@contextlib.contextmanager
def largest(sizes: list[int]) -> Iterator[None]:
    """The elements of every tensor that an operator returns while the body runs."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Watch():
        yield


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    words, width, tokens = 5_000, 4, 64
    head = OutputHead(torch.nn.Linear(width, words, bias=False).requires_grad_(False))
    hidden = torch.randn(tokens, width, requires_grad=True)
    sizes: list[int] = []
    with largest(sizes):
        token_losses(head, hidden, torch.arange(tokens)).losses.sum().backward()
    assert max(sizes) <= max(module.LOSS_CHUNK // 4, words * width)
