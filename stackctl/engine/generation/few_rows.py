"""Products of a few rows with a weight, at hardly more than the time in which the weight is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FEWEST, _MOST = 4, 12
"""Rows from and up to which it is the quicker way: below it BLAS reads the weight once as well, above it packs it
for more rows than that costs."""
_BLOCK = 32


def linear(module: Any, rows: Tensor) -> Tensor:
    """A module's output (rows, out) for its input (rows, in).

    BLAS copies a weight into its own order before it multiplies, which takes longer than a product with a few rows.
    It leaves small matrices as they are: so a plain linear module is multiplied block by block, in one batched call.
    Whatever else the module is, or has attached to it, is called as it is.
    """
    if not (_FEWEST <= len(rows) <= _MOST and _is_plain(module)):
        made: Tensor = module(rows)
        return made
    out, width = module.weight.shape
    blocks = module.weight.view(-1, _BLOCK, width).transpose(1, 2)
    made = torch.bmm(rows.expand(len(blocks), -1, -1), blocks).transpose(0, 1).reshape(-1, out)
    return made if module.bias is None else made.add_(module.bias)


def _is_plain(module: Any) -> bool:
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight  # (out, in)
    return weight.dtype == torch.float32 and weight.shape[0] % _BLOCK == 0 and weight.is_contiguous()
