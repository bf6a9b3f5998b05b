"""RMS norms and rotary positions as one function of autograd each, which keep their input and little else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


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
