"""Full fine-tunes of tiny models, as changes that are added to their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def tuned_model(h: Any, change: Any, name: str = "tuned") -> Path:
    """The base with some of its parameters changed, saved by transformers itself."""
    model = AutoModelForCausalLM.from_pretrained(h.base)
    torch.manual_seed(5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            change(key, parameter)
    folder = h.folder / name
    model.save_pretrained(folder)
    for file in h.base.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def planted(key: str, parameter: torch.Tensor) -> None:
    if parameter.ndim == 2 and ("proj" in key or "c_attn" in key or "c_fc" in key):
        a, b = torch.randn(3, parameter.shape[1]), torch.randn(parameter.shape[0], 3)
        parameter += 0.05 * b @ a
    elif "norm" in key or "ln_" in key:  # beside the linear layers
        parameter += 0.1 * torch.randn_like(parameter)
