"""The algebra of low-rank deltas: small pure functions on factors.

A LoRA (https://arxiv.org/abs/2106.09685) adds ΔW = scaling · B @ A to a weight, with A (rank, in) and B (out, rank).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor, float]
"""A (rank, in), B (out, rank) and everything that scales their product: weight · scaling."""


def concatenate(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """One pair whose product is exactly the sum: ``[s₁B₁ … sₙBₙ] @ [A₁; …; Aₙ]`` = Σ sᵢ Bᵢ Aᵢ.

    The scale is shared out over both factors as √|s|, so that neither loses range in half precision, and its sign
    goes to B. Returns A (Σ rank, in) and B (out, Σ rank) in float32.
    """
    a = torch.cat([A.float() * abs(s) ** 0.5 for A, _, s in factors], dim=0)
    b = torch.cat([B.float() * (abs(s) ** 0.5 if s >= 0 else -(abs(s) ** 0.5)) for _, B, s in factors], dim=1)
    return a, b


def delta(factors: Sequence[Factors], dtype: torch.dtype = torch.float32) -> Tensor:
    """Σ sᵢ Bᵢ Aᵢ, shape (out, in), computed in ``dtype``."""
    total: Tensor | None = None
    for A, B, s in factors:
        product = (B.to(dtype) @ A.to(dtype)) * s
        total = product if total is None else total.add_(product)
    assert total is not None, "a module plan has at least one factor"
    return total


def product_norm(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of B @ A from the factors alone: √trace((BᵀB)(AAᵀ)), in float64, without forming B @ A."""
    A, B = A.double(), B.double()
    return float(((B.T @ B) * (A @ A.T)).sum().clamp_min(0).sqrt())


def relative_error(exact: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """‖B'A' - BA‖ / ‖BA‖ in the Frobenius norm, from the factors (A, B) alone, without forming a product."""
    (A, B), (A2, B2) = exact, other
    norm = product_norm(A, B)
    gap = product_norm(torch.cat([A2.double(), A.double()]), torch.cat([B2.double(), -B.double()], dim=1))
    return gap / norm if norm else 0.0
