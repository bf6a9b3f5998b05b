"""Products of a few rows with a weight, at hardly more than the time in which the weight is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FEWEST, _MOST = 4, 12
"""Rows from and up to which blocks are the quicker way: below it BLAS reads the weight once as well, above it packs it
for more rows than that costs."""
_BLOCK = 32


def product(module: Any) -> Callable[[Tensor], Tensor]:
    """What a linear module makes of rows (rows, in): (rows, out), by the weight that it has now.

    A plain linear module is one operator. BLAS copies a weight into its own order before it multiplies, which takes
    longer than a product with a few rows; small matrices it leaves as they are, so a few rows are multiplied with the
    weight block by block, in one batched call. Whatever else the module is, or has attached to it, is called as it is.
    """
    if type(module) is not nn.Linear or "forward" in vars(module):
        called: Callable[[Tensor], Tensor] = module
        return called
    weight: Tensor = module.weight.detach()  # (out, in)
    bias = None if module.bias is None else module.bias.detach()
    turned, blocks = weight.t(), _blocks(weight)

    def multiply(rows: Tensor) -> Tensor:
        if module._forward_hooks or module._forward_pre_hooks:
            hooked: Tensor = module(rows)
            return hooked
        if blocks is not None and _FEWEST <= len(rows) <= _MOST:
            made = torch.bmm(rows.expand(len(blocks), -1, -1), blocks).transpose(0, 1).reshape(len(rows), -1)
            return made if bias is None else made.add_(bias)
        return torch.mm(rows, turned) if bias is None else torch.addmm(bias, rows, turned)

    return multiply


def _blocks(weight: Tensor) -> Tensor | None:
    """A weight in blocks (blocks, in, out of a block); None where it is cut into none."""
    if weight.dtype != torch.float32 or weight.shape[0] % _BLOCK or not weight.is_contiguous():
        return None
    return weight.view(-1, _BLOCK, weight.shape[1]).transpose(1, 2)
