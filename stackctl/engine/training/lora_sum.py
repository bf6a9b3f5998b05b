"""What the adapter in training adds to a layer's output, without a tensor of the output's size.

PEFT's ``result + lora_B(lora_A(x)) * scaling`` writes three such tensors forward and one back. Here the narrow side is
scaled and its product added to the output in place, by way of what PEFT offers for kinds of LoRA that compute in their
own way. The gradients are the same sums.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackctl.engine.noise import OwnDropout
from stackctl.engine.training.adapter import ADAPTER, new_layers


def add_in_place(model: PeftModel) -> None:
    """Let the adapter in training add to its layers' outputs in place, where the layers are plain ones on a CPU.

    A layer whose adapter is of a kind of its own (DoRA) keeps PEFT's way, as do all other adapters of the model.
    """
    for layer in model.modules():
        if type(layer) is not Linear or ADAPTER not in layer.lora_A or ADAPTER in layer.lora_variant:
            continue
        weight = layer.get_base_layer().weight
        if type(layer.get_base_layer()) in (nn.Linear, Conv1D) and weight.device.type == "cpu":
            layer.lora_variant[ADAPTER] = _InPlace()


def draw_own_noise(model: PeftModel) -> None:
    """Let the dropout of the adapter in training draw its noise by itself, where it is on a CPU."""
    if next(model.parameters()).device.type != "cpu":
        return
    for _, layer in list(new_layers(model)):
        dropouts = layer.lora_dropout
        if ADAPTER in dropouts and type(own := dropouts[ADAPTER]) is nn.Dropout:
            dropouts[ADAPTER] = OwnDropout(own.p).train(own.training)


def is_plain(layer: Any) -> bool:
    """Whether a layer computes what :func:`add_in_place` let it, and that alone: no hooks, no other adapters."""
    if not isinstance(getattr(layer, "lora_variant", {}).get(ADAPTER), _InPlace):
        return False
    base = layer.get_base_layer()
    hooked = layer._forward_hooks or layer._forward_pre_hooks or base._forward_hooks or base._forward_pre_hooks
    return (
        list(layer.active_adapters) == [ADAPTER]
        and not (layer.disable_adapters or layer.merged or hooked or base.weight.requires_grad)
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity | OwnDropout)
    )


class _InPlace(LoraVariant):
    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        dtype = result.dtype
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        x = module.lora_dropout[active_adapter](x)
        summed: Tensor = _Sum.apply(
            result.contiguous(), x.to(dtype), a.to(dtype), b.to(dtype), module.scaling[active_adapter]
        )
        return summed


class _Sum(torch.autograd.Function):
    """``result`` (…, out) + scaling · ``x`` (…, in) Aᵀ Bᵀ, written over ``result``, which no linear layer reads again.

    A (r, in), B (out, r).
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            low = (x.flatten(0, -2) @ a.T).mul_(scaling)  # (T, r)
            summed = result.data
            summed.view(-1, summed.shape[-1]).addmm_(low, b.T)
        ctx.save_for_backward(x, low, a, b)
        ctx.scaling = scaling
        return summed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, a, b = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradient = upstream.reshape(-1, upstream.shape[-1])  # (T, out)
        of_b = gradient.T @ low if needs[3] else None  # (out, r)
        of_low = (gradient @ b).mul_(ctx.scaling)  # (T, r)
        of_a = of_low.T @ x.flatten(0, -2) if needs[2] else None  # (r, in)
        of_x = (of_low @ a).view(x.shape) if needs[1] else None
        return upstream, of_x, of_a, of_b, None
