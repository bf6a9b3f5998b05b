"""Logits and loss of a collated micro-batch, computed only where a label is, and how far two logits lie apart."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stackctl.engine.segment_attention import SEGMENTS


def supervised_loss(model: nn.Module, inputs: dict[str, Tensor], *, as_rows: bool = False) -> Tensor:
    """Summed cross-entropy of a collated micro-batch; logits are computed only where a label is.

    ``inputs``: input_ids and position_ids (1, T), keep (K,), labels (K,), as :func:`stackctl.engine.data.collate`
    makes them. ``as_rows`` runs the examples one by one, for models that cannot keep documents in one row apart.
    """
    if as_rows:
        return torch.stack([supervised_loss(model, part) for part in _split(inputs)]).sum()
    logits = supervised_logits(model, inputs)
    return functional.cross_entropy(logits.float(), inputs["labels"], reduction="sum")


def supervised_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits (K, vocabulary) at the positions that predict a supervised token."""
    keep = inputs["keep"]
    arguments: dict[str, Any] = {
        "input_ids": inputs["input_ids"],
        "position_ids": inputs["position_ids"],
        "use_cache": False,
        "return_dict": True,
    }
    accepted = inspect.signature(causal_lm(model).forward).parameters
    # A record alone in its row has the positions that the model gives it: not all of them count from 0.
    if "position_ids" not in accepted or len(_starts(inputs["position_ids"])) <= 2:
        del arguments["position_ids"]
    if causal_lm(model).config._attn_implementation == SEGMENTS:
        starts = _starts(inputs["position_ids"])
        arguments["segment_lengths"] = [end - start for start, end in itertools.pairwise(starts)]
    if "logits_to_keep" in accepted:
        logits: Tensor = model(**arguments, logits_to_keep=keep).logits[0]
        return logits
    return model(**arguments).logits[0, keep]


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers model under whatever wraps it (DDP, PEFT)."""
    model = getattr(model, "module", model)
    # Asked for by its method, not by its class: importing PEFT takes seconds, which eval can save.
    inside = getattr(model, "get_base_model", None)
    base: nn.Module = inside() if inside else model
    return base


def _starts(positions: Tensor) -> list[int]:
    """Where the records of a row begin, and where the row ends."""
    return [*torch.nonzero(positions[0] == 0).flatten().tolist(), positions.numel()]


def _split(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a collated row, each as a row of its own."""
    parts = []
    for start, end in itertools.pairwise(_starts(inputs["position_ids"])):
        inside = (inputs["keep"] >= start) & (inputs["keep"] < end)
        if bool(inside.any()):
            parts.append(
                {
                    "input_ids": inputs["input_ids"][:, start:end],
                    "position_ids": inputs["position_ids"][:, start:end],
                    "keep": inputs["keep"][inside] - start,
                    "labels": inputs["labels"][inside],
                }
            )
    return parts


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
