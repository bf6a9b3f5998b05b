"""Products of rows with a weight, at hardly more than the time in which the weight is read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stackctl.machine.resources import main_memory

_FEWEST, _FEWEST_AVX2, _MOST = 4, 1, 12
"""Rows from and up to which blocks are the quicker way: below it BLAS reads the weight once as well, but with AVX2 by a
single thread; above it packs it for more rows than that costs."""
_DRAFT_COSTS = {1: 0.10, 2: 0.16, 7: 0.62, 15: 1.07}
_DRAFT_COSTS_AVX2 = {1: 0.25, 2: 0.45, 7: 1.1}
"""How much longer a pass is over so many more tokens than one, in passes over one token."""
_BEFORE, _BEHIND = 4, 16
"""Steps of many rows, the next one among them, and those that may still come, when weights are packed for them."""
_BLOCK = 32
_PACKED_FOR = 32
"""Rows that a weight is packed for; it is right for any number, and measured for 13 to 64."""


class RowProduct:
    """What a plain linear module makes of rows (rows, in): (rows, out), by the weight that it had when this was made.

    BLAS copies a weight into its own order before it multiplies, which takes longer than a product with a few rows;
    small matrices it leaves as they are, so a few rows are multiplied with the weight block by block, in one batched
    call. For more rows the weight may be packed once and for all, see :class:`Packing`. Hooks on the module count.
    """

    def __init__(self, module: nn.Linear) -> None:
        self._module = module
        self._fewest = _FEWEST_AVX2 if _processor() == "AVX2" else _FEWEST
        self.packed: Tensor | None = None
        self.renew()

    def renew(self) -> None:
        """Take the weight from where it lies now; its values are what they were."""
        self.weight: Tensor = self._module.weight.detach()  # (out, in)
        self._bias = None if self._module.bias is None else self._module.bias.detach()
        self._turned, self._blocks = self.weight.t(), _blocks(self.weight)

    def __call__(self, rows: Tensor) -> Tensor:
        module = self._module
        if module._forward_pre_hooks or module._forward_hooks_with_kwargs:
            called: Tensor = module(rows)
            return called
        made = self._multiply(rows)
        for hook in module._forward_hooks.values():
            changed = hook(module, (rows,), made)
            made = made if changed is None else changed
        return made

    def _multiply(self, rows: Tensor) -> Tensor:
        count, bias = len(rows), self._bias
        if self._blocks is not None and self._fewest <= count <= _MOST:
            made = torch.bmm(rows.expand(len(self._blocks), -1, -1), self._blocks).transpose(0, 1).reshape(count, -1)
        elif self.packed is not None and count > _MOST:
            made = _by_packed(rows, self.packed, self.weight)
        elif bias is None:
            return torch.mm(rows, self._turned)
        else:
            return torch.addmm(bias, rows, self._turned)
        return made if bias is None else made.add_(bias)


def product(module: Any) -> Callable[[Tensor], Tensor]:
    """The quickest way to what a linear module makes of rows; one that is not plain is called as it is."""
    if type(module) is nn.Linear and "forward" not in vars(module):
        return RowProduct(module)
    called: Callable[[Tensor], Tensor] = module
    return called


class Packing:
    """Packs weights when that pays: after some steps of many rows, while more may come."""

    def __init__(self, products: Sequence[Callable[[Tensor], Tensor]]) -> None:
        self._products, self._full_steps = products, 0

    def prepare(self, rows: int, steps: int) -> bool:
        """Before a step of so many rows, with so many that may still come; whether it takes packed weights."""
        many = rows > _MOST
        self._full_steps += many
        if many and self._full_steps >= _BEFORE and steps >= _BEHIND:
            pack(self._products)
            self._full_steps = 0  # looked at again after as many steps: there may be memory by then
        return many and any(isinstance(one, RowProduct) and one.packed is not None for one in self._products)


def pack(products: Iterable[Callable[[Tensor], Tensor]]) -> None:
    """Keep the weights in MKL's own order, too, for more than ``_MOST`` rows: as much memory again.

    Nothing is done where this is not to be had (another BLAS, half precision), or would take more than a quarter of the
    free memory.
    """
    plain = [one for one in products if isinstance(one, RowProduct) and one.packed is None and _is_known(one.weight)]
    if not plain or sum(one.weight.nbytes for one in plain) > main_memory().available // 4:
        return
    for one in plain:
        if _is_right(*one.weight.shape):
            one.packed = torch.ops.mkl._mkl_reorder_linear_weight(one.weight, _PACKED_FOR)


def draft_costs() -> Mapping[int, float]:
    """What it costs a pass to check so many guesses, see :class:`~stackctl.engine.generation.drafts.Drafts`."""
    return _DRAFT_COSTS_AVX2 if _processor() == "AVX2" else _DRAFT_COSTS


def _processor() -> str:
    """The vector instructions that PyTorch finds. How long products take was measured on processors with AVX-512 and on
    one with AVX2, see decision 46."""
    found: str = torch.backends.cpu.get_cpu_capability()
    return found


def _is_known(weight: Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.is_contiguous()
    return plain and torch.backends.mkl.is_available()


@functools.cache
def _is_right(out: int, width: int) -> bool:
    """Whether packed weights of this shape give right products: these are PyTorch's operators for its own compiler,
    which packs for one number of rows; MKL's manual does not say that others are right, or wrong."""
    try:
        weight = torch.linspace(-1, 1, out * width).sin_().view(out, width)
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, _PACKED_FOR)
        for count in (_MOST + 1, _PACKED_FOR - 1, _PACKED_FOR, 2 * _PACKED_FOR + 1):
            rows = torch.linspace(-1, 1, count * width).cos().view(count, width)
            if not torch.allclose(_by_packed(rows, packed, weight), rows @ weight.t(), rtol=1e-4, atol=1e-3):
                return False
    except (AttributeError, RuntimeError):  # this PyTorch has no such operators
        return False
    return True


def _by_packed(rows: Tensor, packed: Tensor, weight: Tensor) -> Tensor:
    made: Tensor = torch.ops.mkl._mkl_linear(rows, packed, weight, None, len(rows))
    return made


def _blocks(weight: Tensor) -> Tensor | None:
    """A weight in blocks (blocks, in, out of a block); None where it is cut into none."""
    if weight.dtype != torch.float32 or weight.shape[0] % _BLOCK or not weight.is_contiguous():
        return None
    return weight.view(-1, _BLOCK, weight.shape[1]).transpose(1, 2)
