"""How llama.cpp calls and lays out the tensors of a LoRA, by architecture, and the way back.

Read in its conversion/llama.py and convert_lora_to_gguf.py. Llama-like models have the rows of q and k in another order
than in Transformers, and so has B.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from stackctl.core.errors import Incompatible, listed
from stackctl.plan.lint import GgufArchitecture
from stackctl.plan.stack_plan import ModulePlan, StackPlan


@dataclass(frozen=True, slots=True)
class GgufTarget:
    """Where a module's pair goes. ``heads``: into how many its rows are permuted, or 0 for rows that stay."""

    module: ModulePlan
    name: str
    heads: int

    def layout(self, rank: int) -> list[tuple[str, tuple[int, int]]]:
        """The two tensors with their shapes as numpy counts them (GGUF counts from the other end)."""
        rows, columns = self.module.shape
        if self.module.type == "Embedding":
            return [(f"{self.name}.lora_a", (rows, rank)), (f"{self.name}.lora_b", (columns, rank))]
        return [(f"{self.name}.lora_a", (rank, columns)), (f"{self.name}.lora_b", (rows, rank))]


def gguf_targets(plan: StackPlan, architecture: GgufArchitecture, config: Mapping[str, Any]) -> list[GgufTarget]:
    """Every module's tensor in llama.cpp's words.

    Raises:
        Incompatible: llama.cpp has no such tensor, or the configuration does not say how many heads there are.
    """
    known = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(known, config_count(config, "num_hidden_layers", "n_layer"))
    targets, unknown = [], []
    for module in plan.modules.values():
        name = names.get_name(f"{module.name}.weight", try_suffixes=(".weight",))
        if name is None:
            unknown.append(module.name)
            continue
        targets.append(GgufTarget(module, name, _heads(module, config) if architecture.permuted else 0))
    if unknown:
        raise Incompatible(f"llama.cpp has no tensor for {listed(unknown)} of {plan.expression}", hint="--format model")
    return targets


def _heads(module: ModulePlan, config: Mapping[str, Any]) -> int:
    """Into how many heads the rows of a module are permuted: those of q and k, in Llama-like models."""
    if module.name.endswith(".q_proj"):
        heads = config_count(config, "num_attention_heads")
    elif module.name.endswith(".k_proj"):
        heads = config_count(config, "num_key_value_heads", "num_attention_heads")
    else:
        return 0
    if module.shape[0] % (2 * heads):
        raise Incompatible(f"{module.name} has {module.shape[0]} rows, not {heads} heads of even size")
    return heads


def config_count(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    raise Incompatible(f"the base's config.json has no {keys[0]}", hint="restore it from where it came")


def lay_out(a: Tensor, b: Tensor, target: GgufTarget, rank: int) -> tuple[Tensor, Tensor]:
    """A pair as llama.cpp wants it: padded with zeros to ``rank``, rows of B in its order, an embedding's A upright."""
    missing = rank - a.shape[0]
    a, b = functional.pad(a, (0, 0, 0, missing)), functional.pad(b, (0, missing))
    if target.heads:
        b = b[_rows(b.shape[0], target.heads)]
    return (a.T if target.module.type == "Embedding" else a).contiguous(), b.contiguous()


def _rows(count: int, heads: int) -> Tensor:
    """Which of Transformers' rows stands in each of llama.cpp's: the two halves of every head, taken in turns."""
    return torch.arange(count).reshape(heads, 2, -1).transpose(1, 2).flatten()


def undo_layout(a: Any, b: Any, target: GgufTarget) -> tuple[Any, Any]:
    """The inverse of :func:`lay_out`, without its padding: of every head the even rows, then the odd ones."""
    if target.heads:
        rows = b.reshape(target.heads, -1, 2, b.shape[1])
        b = np.stack([rows[:, :, 0], rows[:, :, 1]], axis=1).reshape(b.shape)
    return (a.T if target.module.type == "Embedding" else a), b
