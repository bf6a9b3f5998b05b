"""What is computed by fused functions has the loss and the gradients of PEFT's and transformers' own forwards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    NemotronConfig,
    Olmo2Config,
    OlmoConfig,
    SmolLM3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.data.rows import collate
from stackctl.engine.loss.logits import supervised_loss
from stackctl.engine.loss.row_layout import choose_layout
from stackctl.engine.noise import drawn_from
from stackctl.engine.training.fused_modules import fuse
from stackctl.engine.training.lora_sum import add_in_place, draw_own_noise
from tests.tiny import SIZES

CONFIGS: dict[str, Any] = {
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "granite": GraniteConfig(**SIZES),
    "smollm3, a layer without positions": SmolLM3Config(**SIZES, no_rope_layers=[1, 0]),
    "olmo2": Olmo2Config(**SIZES),
    "nemotron": NemotronConfig(**SIZES),
    "olmo, limited": OlmoConfig(**SIZES, clip_qkv=6.0),
}
FUSED = {
    "llama": 9, "mistral": 9, "qwen2": 9, "qwen3": 13, "llama with biases": 9, "granite": 9,
    "smollm3, a layer without positions": 8, "olmo2": 11, "olmo, limited": 2, "nemotron": 2,
    "gemma": 2, "gpt2": 0, "phi3": 5, "neox": 0,
}  # fmt: skip
"""Of two layers: attention, MLP, and norms, with those of q and k. OLMo 2 norms queries before they are parted in
heads, OLMo limits queries, keys and values, Nemotron turns a half of each head, which is seen at the step. Gemma's
weights of norms begin at zero and its MLP has another activation, Phi 3 has joined projections."""


def examples() -> list[Example]:
    draw = random.Random(0)
    made = []
    for length in (70, 3, 41, 18):
        ids = [draw.randrange(256) for _ in range(length)]
        made.append(
            Example(ids, [IGNORED, *(token if draw.random() < 0.6 else IGNORED for token in ids[1:-1]), ids[-1]])
        )
    return made


def made(config: Any) -> Any:
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return kind(config)


def adapted(name: str, models: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    if name in CONFIGS:
        model = made(copy.deepcopy(CONFIGS[name]))
        for parameter in model.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.15)
    else:
        model = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    found: Any = get_peft_model(model, LoraConfig(**settings))
    for parameter in found.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return found.train()


def computed(model: Any) -> tuple[float, torch.Tensor]:
    loss = supervised_loss(model, collate(examples()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])


def same(found: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> bool:
    apart = (found[1].double() - expected[1].double()).norm() / expected[1].double().norm()
    return abs(found[0] - expected[0]) <= 1e-6 * abs(expected[0]) and float(apart) < 1e-5


def beside_float64(name: str, models: Any, **settings: Any) -> tuple[Any, Any]:
    """A model as training has it before it is fused, and the same in float64."""
    model = adapted(name, models, **settings)
    choose_layout(model, examples(), longest=70)
    draw_own_noise(model)
    exact = copy.deepcopy(model).double()
    add_in_place(model)
    return model, exact


@pytest.mark.parametrize("name", FUSED)
def test_loss_and_gradients_are_those_of_float64(name: str, models: Any) -> None:
    model, exact = beside_float64(name, models)
    before = torch.get_rng_state()
    assert fuse(model) == FUSED[name]
    assert torch.equal(torch.get_rng_state(), before), "what is drawn later stays what it was"
    assert model.training
    assert same(computed(model), computed(exact))
    assert same(computed(model), computed(exact)), "a second step finds nothing written over"


@pytest.mark.parametrize("name", FUSED)
def test_with_the_same_dropout_loss_and_gradients_are_those_of_float64(name: str, models: Any) -> None:
    """Which PEFT computes layer by layer, and each layer draws its own."""
    model, exact = beside_float64(name, models, lora_dropout=0.3)
    assert fuse(model) == FUSED[name]
    found = []
    for seed in (1, 1, 2):
        with drawn_from(seed):
            found.append(computed(model))
        with drawn_from(seed):
            assert same(found[-1], computed(exact))
    assert found[0][0] == found[1][0] != found[2][0]
    model.eval()
    exact.eval()
    assert same(computed(model), computed(exact)), "and without it in evaluation"


@pytest.mark.parametrize("name", FUSED)
def test_what_training_makes_larger_is_computed_as_before(name: str, models: Any) -> None:
    model, exact = beside_float64(name, models)
    assert fuse(model) == FUSED[name]
    with torch.no_grad():
        for grown in (model, exact):
            for parameter in grown.parameters():
                if parameter.requires_grad:
                    parameter.mul_(3)
    assert abs(computed(model)[0] - (loss := computed(exact)[0])) <= 1e-4 * loss, "no limit is left out"


@pytest.mark.parametrize(
    ("model_type", "targets"),
    [("cohere_compass_text", ["q_proj", "k_proj", "v_proj", "o_proj"]), ("falcon_mamba", ["in_proj"])],
)
def test_calls_unlike_those_that_were_looked_at_are_computed_as_before(model_type: str, targets: list[str]) -> None:
    """A layer that turns no positions beside one that does, and a norm of rows shorter than its weight."""
    settings: Any = {"r": 4, "target_modules": targets, "init_lora_weights": False}
    model: Any = get_peft_model(tiny_model(model_type), LoraConfig(**settings)).train()
    add_in_place(model)
    inputs = collate(examples()[:1])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def one() -> tuple[float, torch.Tensor]:
        loss = supervised_loss(model, inputs)
        return float(loss.detach()), torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)])

    expected = one()
    assert fuse(model)
    assert same(one(), expected)


@pytest.mark.parametrize("name", FUSED)
def test_under_autocast_nothing_is_less_exact(name: str, models: Any) -> None:
    """Products are rounded to bfloat16 where autocast does so: both ways are as far from float64."""
    model, double = beside_float64(name, models)
    exact = computed(double)[1]

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            gradients = computed(model)[1]
        return float((gradients.double() - exact).norm() / exact.norm())

    own = error()
    assert fuse(model) == FUSED[name]
    assert error() <= 1.25 * own < 0.3


@pytest.mark.parametrize(("name", "count"), [("bamba", 8), ("granitemoehybrid", 6), ("cohere_compass_text", 4)])
def test_positions_of_a_part_of_each_head_or_none_are_left_to_the_layer(name: str, count: int) -> None:
    torch.manual_seed(0)
    model: Any = get_peft_model(tiny_model(name), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    choose_layout(model.train(), examples(), longest=70)
    add_in_place(model)
    before = computed(model)
    assert fuse(model) == count
    assert same(computed(model), before)


def test_activations_can_be_computed_again(models: Any) -> None:
    model = adapted("llama", models)
    add_in_place(model)
    assert fuse(model)
    expected = computed(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert same(computed(model), expected)


def switched_off(model: Any) -> tuple[float, torch.Tensor]:
    with model.disable_adapter(), torch.no_grad():
        return float(supervised_loss(model, collate(examples()))), torch.ones(1)


def without_gradients(model: Any) -> tuple[float, torch.Tensor]:
    with torch.no_grad():
        return float(supervised_loss(model, collate(examples()))), torch.ones(1)


def two_adapters(model: Any) -> tuple[float, torch.Tensor]:
    if "frozen" not in model.peft_config:
        torch.manual_seed(5)
        model.add_adapter("frozen", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["frozen", "default"])
    return computed(model)


@pytest.mark.parametrize("how", [switched_off, without_gradients, two_adapters])
def test_what_is_no_plain_step_is_computed_as_before(how: Callable[..., Any], models: Any) -> None:
    model, plain = adapted("llama", models), adapted("llama", models)
    add_in_place(model)
    assert fuse(model)
    add_in_place(plain)
    found, expected = how(model), how(plain)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert float((found[1] - expected[1]).norm()) <= 1e-5 * float(expected[1].norm())


def test_what_comes_out_may_be_written_over(models: Any) -> None:
    """Llama 4 adds its experts to what a gated MLP gives, in place."""

    def written(model: Any) -> tuple[float, torch.Tensor]:
        for module in model.modules():
            if type(module).__name__ in ("LlamaMLP", "LlamaRMSNorm"):
                module.register_forward_hook(lambda _, __, output: output.add_(0.5))
        return computed(model)

    model = adapted("llama", models)
    plain = copy.deepcopy(model)
    add_in_place(model)
    assert fuse(model) == FUSED["llama"]
    assert same(written(model), written(plain))


def test_dropout_keeps_a_layers_own_forward(models: Any) -> None:
    model = adapted("llama", models, lora_dropout=0.5)
    add_in_place(model)
    assert fuse(model) == 5, "the norms alone"
    config = LlamaConfig(**SIZES, attention_dropout=0.5)
    model = get_peft_model(made(config), LoraConfig(target_modules="all-linear"))
    add_in_place(model)
    assert fuse(model) == 7, "in attention it is training alone that shows it"


def test_a_module_that_only_looks_alike_is_left(models: Any) -> None:
    model = adapted("llama", models)
    mlp = type(model.get_base_model().model.layers[0].mlp)

    class Clamped(mlp):  # type: ignore[misc,valid-type]
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).clamp(-0.05, 0.05)

    model.get_base_model().model.layers[1].mlp.__class__ = Clamped
    model.get_base_model().model.norm.forward = lambda x: x
    add_in_place(model)
    assert fuse(model) == 7
