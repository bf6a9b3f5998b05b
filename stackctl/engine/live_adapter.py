"""A stack beside the base instead of in it: one concatenated LoRA, attached by PEFT and taken off again."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

from stackctl.core.errors import Incompatible
from stackctl.engine import algebra
from stackctl.engine.tensors import MemberTensors
from stackctl.lora.checkpoint import plain_lora_config
from stackctl.plan.methods import SUM
from stackctl.plan.model import StackPlan

LIVE = "frozen"
"""The name that a live frozen stack has inside PEFT; the adapter in training is PEFT's own ``default``."""
_HINT = "fold it: --frozen fold in train, no --live in generate"


def attach_live(model: PeftModel | PreTrainedModel, plan: StackPlan, name: str = LIVE) -> None:
    """Add a whole stack to a model as one live, frozen LoRA without dropout.

    Raises:
        Incompatible: a member brings whole modules, which cannot be kept beside the base.
    """
    plan.check()
    if plan.method != SUM:
        raise Incompatible(f"a stack composed by {plan.method} is no sum, and only a sum can be kept live", hint=_HINT)
    if plan.replacements:
        label = plan.members[plan.replacements[0].member].label
        raise Incompatible(f"{label} carries whole modules, which cannot be kept live", hint=_HINT)
    target = model.base_model.model if isinstance(model, PeftModel) else model
    config = LoraConfig(**plain_lora_config({module.name: module.rank for module in plan.modules.values()}))
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        inject_adapter_in_model(config, target, name)
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            layer = target.get_submodule(module.name)
            assert isinstance(layer, LoraLayer)
            a, b = algebra.concatenate(tensors.factors(module))
            if name in layer.lora_embedding_A:
                layer.lora_embedding_A[name].copy_(a)
                layer.lora_embedding_B[name].copy_(b)
            else:
                layer.lora_A[name].weight.copy_(a)
                layer.lora_B[name].weight.copy_(b)


def detach_live(model: PreTrainedModel) -> None:
    """Put the base's own layers back in the places of those that :func:`attach_live` made."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
