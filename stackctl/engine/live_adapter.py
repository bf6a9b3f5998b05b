"""A stack beside the base instead of in it: one concatenated LoRA, attached by PEFT and taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel

from stackctl.core.errors import Incompatible
from stackctl.engine.base.module_shapes import is_called
from stackctl.engine.merging import module_pair
from stackctl.engine.tensors import MemberTensors
from stackctl.lora.lora_config import plain_lora_config
from stackctl.lora.target_parameters import is_parameter_target
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import ModulePlan, StackPlan

LIVE = "frozen"
"""The name that a live frozen stack has inside PEFT; the adapter in training is PEFT's own ``default``."""
FOLD_HINT = "fold it: --frozen fold in train, no --live in generate"
FOUR_BITS_HINT = "fold it: train without --dtype nf4, and without --frozen live"
"""What can be done where a stack cannot be kept live."""


def attach_live(model: PeftModel | PreTrainedModel, plan: StackPlan) -> None:
    """Add a whole stack to a model as one live, frozen LoRA without dropout.

    Raises:
        Incompatible: a member brings whole modules or biases, which cannot be kept beside the base, or changes a layer
            that the model does not call.
    """
    plan.check()
    others = [config.target_parameters for config in getattr(model, "peft_config", {}).values()]
    named = next((names for names in others if names), None)
    target: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    hint = FOUR_BITS_HINT if getattr(target, "is_loaded_in_4bit", False) else FOLD_HINT
    check_live(plan, named, hint)
    _check_called(target, plan, hint)
    modules, parameters = plan.peft_names({module.name: module.rank for module in plan.modules.values()})
    config = LoraConfig(**plain_lora_config(modules, parameters))
    if parameters and named:  # PEFT wants the same set, word for word; what has no factors stays without effect
        config.target_parameters = list(named)
    if isinstance(model, PeftModel):
        model.add_adapter(LIVE, config)
    else:
        inject_adapter_in_model(config, target, LIVE)
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            layer = lora_layer(target, module)
            pair = module_pair(plan, module, tensors.factors(module))
            for own, factor in zip(layer_factors(layer, LIVE), pair, strict=True):
                own.copy_(factor)


def _check_called(model: nn.Module, plan: StackPlan, hint: str) -> None:
    """Whether the model calls every layer that a stack changes: what is beside one that it does not has no effect."""
    with MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            if not is_called(model, module.name) and any(B.any() for _, B, _ in tensors.factors(module)):
                raise Incompatible(
                    f"{plan.expression} changes {module.name}, which {type(model).__name__} does not call but reads the"
                    " weight of: kept live beside it the change would have no effect",
                    hint=hint,
                )


def check_live(plan: StackPlan, parameters: Sequence[str] | None, hint: str = FOLD_HINT) -> None:
    """Whether a stack can be kept beside the base, and beside an adapter on ``parameters`` where there is one.

    ``hint`` is what can be done where it cannot.

    Raises:
        Incompatible: it cannot; the message says why.
    """
    if plan.method != SUM:
        raise Incompatible(f"a stack composed by {plan.method} cannot be kept live: only a sum can", hint=hint)
    if plan.replacements:
        raise Incompatible(f"{plan.brought}, which cannot be kept live", hint=hint)
    own = plan.peft_names(dict.fromkeys(plan.modules, 1))[1]  # experts, and a router that is no linear layer
    if left_out := [name for name in own if parameters and not is_parameter_target(parameters, name)]:
        raise Incompatible(
            f"the live stack stands on {left_out[0]} and the new adapter does not, and PEFT keeps only adapters of "
            "the same parameters live together",
            hint=f"name it in --target-modules, too, or {hint}",
        )


def layer_factors(layer: LoraLayer, name: str) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) and B (out, r) of an adapter, as PEFT holds them; it keeps those of embeddings elsewhere."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    return cast(nn.Parameter, layer.lora_A[name].weight), cast(nn.Parameter, layer.lora_B[name].weight)


def lora_layer(model: nn.Module, module: ModulePlan) -> LoraLayer:
    """What PEFT put around a module; around one with parameters it puts a wrapper for each, one around the other."""
    layer = model.get_submodule(module.name.rpartition(".")[0] if module.is_experts else module.name)
    while module.is_experts and isinstance(layer, ParamWrapper) and layer.parameter_name != module.name.split(".")[-1]:
        layer = layer.base_layer
    assert isinstance(layer, LoraLayer)
    return layer


def detach_live(model: PreTrainedModel) -> None:
    """Put the base's own layers back in the places of those that :func:`attach_live` made."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, layer in layers.items():
        if name.removesuffix(".base_layer") in layers and name.endswith(".base_layer"):  # a wrapper within another
            continue
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
