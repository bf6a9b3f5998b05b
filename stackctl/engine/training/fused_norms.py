"""RMS norms and rotary positions as one function of autograd each, which keep their input and little else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from stackctl.engine.training.fused_products import blocks


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x`` (…, d) / sqrt(mean(x²) + eps) · ``weight`` (d,), which is frozen."""
    normed: Tensor = _RmsNorm.apply(x, weight, eps)
    return normed


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions of ``x`` (T, heads, d) as Llama has them: x · cosine + (-x₂, x₁) · sine, both (T, 1, d)."""
    turned: Tensor = _Rotation.apply(x, cosine, sine)
    return turned


class _RmsNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        normed, inverse = torch.empty_like(flat), flat.new_empty(len(flat), 1)
        for part in blocks(flat):
            rows, out = flat[part], normed[part]
            mean = torch.mul(rows, rows, out=out).mean(-1, keepdim=True)
            inverse[part] = mean.add_(eps).rsqrt_()
            torch.mul(rows, inverse[part], out=out).mul_(weight)
        ctx.save_for_backward(flat, inverse, weight)
        return normed.view(x.shape)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inverse, weight = ctx.saved_tensors
        flat = upstream.reshape(x.shape)
        gradient = torch.empty_like(x)
        for part in blocks(x):  # (g - x · mean(g · x) · inverse²) · inverse, g = upstream · weight
            rows, out, scale = x[part], gradient[part], inverse[part]
            weighted = flat[part] * weight
            share = torch.mul(weighted, rows, out=out).mean(-1, keepdim=True).mul_(scale).mul_(scale)
            torch.mul(rows, share, out=out)
            torch.sub(weighted, out, out=out).mul_(scale)
        return gradient.view(upstream.shape), None, None


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
    turned = x.new_empty(x.shape)
    half = x.shape[-1] // 2
    for part in blocks(x):
        rows, out = x[part], turned[part]
        torch.mul(rows, cosine[part], out=out)
        out[..., :half].addcmul_(rows[..., half:], first[part])
        out[..., half:].addcmul_(rows[..., :half], second[part])
    return turned
