"""The proofs of every training run: what trained, what stayed frozen, and that the frozen stack was active.

A run that cannot be proved is not registered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils import TrainableTokensWrapper
from torch import Tensor

from stackctl.core.errors import VerificationFailed
from stackctl.engine.loss.logits import difference
from stackctl.engine.training.adapter import ADAPTER

_PROBE_TOKENS = 64


def probe_tokens(input_ids: list[int]) -> Tensor:
    """A short piece of the training data, (1, T), to look at logits with."""
    return torch.tensor([input_ids[:_PROBE_TOKENS]])


def check_active(without: Tensor, with_stack: Tensor, expression: str) -> float:
    """The frozen stack changes the logits. Returns by how much, relative.

    Raises:
        VerificationFailed: switching it off changes nothing, or with it they are no finite numbers.
    """
    if not bool(with_stack.isfinite().all()):
        raise VerificationFailed(
            f"with the frozen stack {expression} the logits are not finite numbers",
            hint="use smaller weights, or --dtype float32",
        )
    effect = difference(without, with_stack)
    if not effect > 0:
        raise VerificationFailed(
            f"the frozen stack {expression} has no effect: with and without it the logits are the same",
            hint="check its weights: stackctl inspect " + expression,
        )
    return effect


def check_trainable(model: PeftModel) -> int:
    """Exactly the new adapter's factors, and its rows of single tokens, are trainable. Returns how many values that is.

    Raises:
        VerificationFailed: something else is, or one of them is not.
    """
    parts = {"lora_A": ".weight", "lora_B": ".weight", "lora_embedding_A": "", "lora_embedding_B": ""}
    wanted = {
        f"{name}.{part}.{ADAPTER}{suffix}"
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
        for part, suffix in parts.items()
        if ADAPTER in getattr(module, part)
    }
    wanted |= {
        f"{name}.trainable_tokens_delta.{ADAPTER}"
        for name, module in model.named_modules()
        if isinstance(module, TrainableTokensLayer)
        if ADAPTER in module.trainable_tokens_delta and module.tied_adapter is None
    }
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if set(trainable) != wanted or not wanted:
        odd = sorted(set(trainable) ^ wanted)[:3]
        raise VerificationFailed(f"the trainable parameters are not exactly the new adapter's: {', '.join(odd)}")
    return sum(parameter.numel() for parameter in trainable.values())


@contextlib.contextmanager
def new_adapter_off(model: PeftModel, live: str | None) -> Iterator[None]:
    """The model as the frozen stack alone makes it; trainability is put back afterwards."""
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    kinds = (LoraLayer, TrainableTokensLayer, TrainableTokensWrapper)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    before = [list(layer.active_adapters) for layer in layers]
    for layer in layers:  # the rows of a frozen stack are in the weights
        layer._active_adapter = [live] if live and isinstance(layer, LoraLayer) else []
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)


def check_unchanged(before: Tensor, after: Tensor) -> None:
    """The frozen part gives the same logits after training, bit for bit on a CPU.

    Raises:
        VerificationFailed: it does not.
    """
    if not torch.equal(before, after) and difference(after, before) > 1e-6:
        raise VerificationFailed("the frozen weights changed during training; nothing was registered")
