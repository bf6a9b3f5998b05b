"""Layers as one function of autograd each, which keep their input and little else: fewer passes over memory.

They are norms, rotary positions, and linear layers with the adapter in training on them. Linear layers that read the
same input add to one gradient of it instead of making one each, and their narrow sides A are one product; a gated MLP
keeps of its wide tensors the two that its backward pass needs, which it then writes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import silu

from stackctl.engine.noise import OwnDropout


@dataclass(frozen=True)
class Product:
    """``x`` (T, in) to ``x`` Wᵀ + bias + scaling · ``x`` Aᵀ Bᵀ (T, out): W (out, in) frozen, A (r, in), B (out, r).

    A reads what a ``dropout`` leaves of ``x``, for each product something else.
    """

    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    scaling: float
    dropout: OwnDropout | None = None

    @property
    def scale(self) -> float:
        """By which the sum over what is kept of ``x`` is multiplied."""
        return self.scaling / self.dropout.keeps if self.dropout else self.scaling

    def mask(self, x: Tensor) -> Tensor | None:
        """What of ``x`` is kept, if not all."""
        return self.dropout.mask(x) if self.dropout else None


def factors(products: Sequence[Product]) -> list[Tensor]:
    """A and B of each in turn, as the functions below take them."""
    return [factor for product in products for factor in (product.a, product.b)]


def apply_products(x: Tensor, products: Sequence[Product]) -> tuple[Tensor, ...]:
    """What each of them makes of the same ``x`` (…, in): (…, out)."""
    rows = x.flatten(0, -2).to(products[0].weight.dtype)
    outputs = _Products.apply(rows, products, *factors(products))
    return tuple(output.view(*x.shape[:-1], -1) for output in outputs)


def apply_gated_mlp(x: Tensor, gate: Product, up: Product, down: Product) -> Tensor:
    """``down(silu(gate(x)) · up(x))`` of ``x`` (…, d)."""
    rows = x.flatten(0, -2).to(gate.weight.dtype)
    output: Tensor = _GatedMlp.apply(rows, (gate, up), down, *factors((gate, up, down)))
    return output.view(*x.shape[:-1], -1)


class _Products(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, products: Sequence[Product], *_: Tensor) -> tuple[Tensor, ...]:
        outputs, low, masks = _forward(x, products)
        ctx.save_for_backward(x, low, *masks)
        ctx.products = products
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, low, *masks = ctx.saved_tensors
        of_x, of_factors = _backward(upstream, x, low, masks, ctx.products, wanted=ctx.needs_input_grad[0])
        return of_x, None, *of_factors


class _GatedMlp(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: tuple[Product, Product], down: Product, *_: Tensor) -> Tensor:
        (gate, up), low, masks = _forward(x, inner)
        hidden = silu(gate).mul_(up)
        (output,), low_hidden, masks_hidden = _forward(hidden, (down,))
        ctx.save_for_backward(x, gate, up, low, low_hidden, *masks, *masks_hidden)
        ctx.inner, ctx.down = inner, down
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, gate, up, low, low_hidden, *masks, mask = ctx.saved_tensors
        down: Product = ctx.down
        of_low = torch.mm(gradient, down.b).mul_(down.scale)
        of_hidden = _add_kept(torch.mm(gradient, down.weight), of_low, down.a, mask)
        hidden, of_activation = silu(gate), of_hidden * up
        of_hidden.mul_(hidden)  # the gradient of up, as gate becomes that of gate
        hidden.mul_(up)
        torch.ops.aten.silu_backward.grad_input(of_activation, gate, grad_input=gate)
        of_down = [of_low.T @ _kept(hidden, mask), (gradient.T @ low_hidden).mul_(down.scale)]
        del hidden, of_activation
        of_x, of_inner = _backward([gate, of_hidden], x, low, masks, ctx.inner, wanted=ctx.needs_input_grad[0])
        return of_x, None, None, *of_inner, *of_down


def _forward(x: Tensor, products: Sequence[Product]) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """Outputs (T, out), what is kept of ``x`` times Aᵀ of all side by side (T, n · r), and which that is."""
    masks = [product.mask(x) for product in products]
    if any(mask is not None for mask in masks):
        low = torch.cat([_kept(x, mask) @ product.a.T for product, mask in zip(products, masks, strict=True)], 1)
    else:
        low = torch.mm(x, _side_by_side(products).T)
    outputs, place = [], 0
    for product in products:
        rank = len(product.a)
        weight, own = product.weight.T, low[:, place : place + rank]
        output = torch.mm(x, weight) if product.bias is None else torch.addmm(product.bias, x, weight)
        outputs.append(output.addmm_(own, product.b.T, alpha=product.scale))
        place += rank
    return outputs, low, masks


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def _add_kept(of_x: Tensor, of_low: Tensor, a: Tensor, mask: Tensor | None) -> Tensor:
    """Add what comes back through A to a gradient (T, in), where ``x`` was kept."""
    return of_x.addmm_(of_low, a) if mask is None else of_x.add_(torch.mm(of_low, a).mul_(mask))


def _backward(
    gradients: Sequence[Tensor],
    x: Tensor,
    low: Tensor,
    masks: Sequence[Tensor | None],
    products: Sequence[Product],
    *,
    wanted: bool,
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradient of ``x``, if it is ``wanted``, and those of A and B of each product."""
    of_low, of_b, place = torch.empty_like(low), [], 0
    of_x: Tensor | None = None
    for gradient, product in zip(gradients, products, strict=True):
        own = slice(place, place + len(product.a))
        torch.mm(gradient, product.b, out=of_low[:, own])
        of_low[:, own].mul_(product.scale)
        of_b.append((gradient.T @ low[:, own]).mul_(product.scale))
        if wanted:
            of_x = torch.mm(gradient, product.weight) if of_x is None else of_x.addmm_(gradient, product.weight)
        place = own.stop
    ranks = [len(product.a) for product in products]
    if all(mask is None for mask in masks):
        if of_x is not None:
            of_x.addmm_(of_low, _side_by_side(products))
        of_a: Sequence[Tensor] = (of_low.T @ x).split(ranks)
    else:
        parts = of_low.split(ranks, 1)
        for product, part, mask in zip(products, parts, masks, strict=True):
            if of_x is not None:
                _add_kept(of_x, part, product.a, mask)
        of_a = [part.T @ _kept(x, mask) for part, mask in zip(parts, masks, strict=True)]
    return of_x, [factor for pair in zip(of_a, of_b, strict=True) for factor in pair]


def _side_by_side(products: Sequence[Product]) -> Tensor:
    """A of all of them (n · r, in)."""
    return products[0].a if len(products) == 1 else torch.cat([product.a for product in products])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` (…, d) / sqrt(mean(x²) + eps) · ``weight`` (d,), which is frozen."""
    normed: Tensor = _RmsNorm.apply(x.reshape(-1, x.shape[-1]), weight, eps)
    return normed.view(x.shape)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions of ``x`` (T, heads, d) as Llama has them: x · cosine + (-x₂, x₁) · sine, both (T, 1, d)."""
    turned: Tensor = _Rotation.apply(x, cosine, sine)
    return turned


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed = x * x
        inverse = normed.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(x, inverse, out=normed).mul_(weight)
        ctx.save_for_backward(x, inverse, weight)
        return normed

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inverse, weight = ctx.saved_tensors
        weighted = upstream * weight
        gradient = weighted * x  # (g - x · mean(g · x) · inverse²) · inverse, g = upstream · weight
        share = gradient.mean(-1, keepdim=True).mul_(inverse).mul_(inverse)
        torch.mul(x, share, out=gradient)
        torch.sub(weighted, gradient, out=gradient).mul_(inverse)
        return gradient, None, None


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        half = x.shape[-1] // 2
        return _turned(x, cosine, -sine[..., :half], sine[..., half:])

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        cosine, sine = ctx.saved_tensors
        half = upstream.shape[-1] // 2
        return _turned(upstream, cosine, sine[..., half:], -sine[..., :half]), None, None


def _turned(x: Tensor, cosine: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``x`` · cosine + (x₂ · first, x₁ · second), contiguous."""
    half = x.shape[-1] // 2
    turned = torch.mul(x, cosine, out=cosine.new_empty(x.shape))
    turned[..., :half].addcmul_(x[..., half:], first)
    turned[..., half:].addcmul_(x[..., :half], second)
    return turned
