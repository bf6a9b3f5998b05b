"""The algebra of low-rank deltas: small pure functions on factors.

A LoRA (https://arxiv.org/abs/2106.09685) adds ΔW = scaling · B @ A to a weight, with A (rank, in) and B (out, rank).
Everything is computed in float32 at least. The methods that are not the exact sum work on ΔW = BA, never on A and
B apart, which would be another thing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

Factors = tuple[Tensor, Tensor, float]
"""A (rank, in), B (out, rank) and everything that scales their product: weight · scaling."""
Pair = tuple[Tensor, Tensor]
"""A (rank, in) and B (out, rank) of a delta that needs no scaling."""
_BLOCK = 1 << 16
"""Entries of a block."""
_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding."""


# -- the experts of a mixture, whose factors are stored together (stackctl.lora.target_parameters) ---------------------


def split_experts(factors: Sequence[Factors], experts: int) -> list[list[Factors]]:
    """Factors of all experts together, A (experts · rank, in) and B (out, rank · experts), as those of each expert."""
    apart: list[list[Factors]] = [[] for _ in range(experts)]
    for A, B, s in factors:
        a, b = A.view(experts, -1, A.shape[1]), B.view(B.shape[0], -1, experts)
        for index, own in enumerate(apart):
            own.append((a[index], b[:, :, index], s))
    return apart


def join_experts(pairs: Sequence[Pair]) -> Pair:
    """The inverse of :func:`split_experts` for one pair an expert; lower ranks are filled up with zeros."""
    rank = max(a.shape[0] for a, _ in pairs)
    a = torch.cat([functional.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
    b = torch.stack([functional.pad(b, (0, rank - b.shape[1])) for _, b in pairs], dim=2)  # (out, rank, experts)
    return a, b.reshape(b.shape[0], -1)


# -- exact ------------------------------------------------------------------------------------------------------------


def concatenate(factors: Sequence[Factors]) -> Pair:
    """One pair whose product is exactly the sum: ``[s₁B₁ … sₙBₙ] @ [A₁; …; Aₙ]`` = Σ sᵢ Bᵢ Aᵢ.

    The scale is shared out over both factors as √|s|, so that neither loses range in half precision, and its sign
    goes to B. Returns A (Σ rank, in) and B (out, Σ rank) in float32.
    """
    a = torch.cat([A.float() * abs(s) ** 0.5 for A, _, s in factors], dim=0)
    b = torch.cat([B.float() * (abs(s) ** 0.5 if s >= 0 else -(abs(s) ** 0.5)) for _, B, s in factors], dim=1)
    return a, b


def delta(factors: Sequence[Factors], dtype: torch.dtype = torch.float32) -> Tensor:
    """Σ sᵢ Bᵢ Aᵢ, shape (out, in), computed in ``dtype``."""
    products = ((B.to(dtype) @ A.to(dtype)) * s for A, B, s in factors)
    total = next(products)  # a module plan has at least one factor
    for product in products:
        total.add_(product)
    return total


# -- the sum, truncated -----------------------------------------------------------------------------------------------


def truncate(factors: Sequence[Factors], *, rank: int | str, tolerance: float | None = None, **_: Any) -> Pair:
    """The best approximation of the sum of a given rank (Eckart and Young, 1936), without ever forming the sum.

    ``rank`` "auto" is the smallest for which ‖lost‖ / ‖sum‖ stays within ``tolerance``.
    """
    q_b, u, sigma, v, q_a = thin_svd(*concatenate(factors))
    keep = _smallest_rank(sigma, tolerance or 0.0) if rank == "auto" else min(int(rank), sigma.numel())
    root = sigma[:keep].sqrt()
    return (root[:, None] * (v[:, :keep].T @ q_a.T)).float(), ((q_b @ u[:, :keep]) * root).float()


def thin_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The singular value decomposition of B @ A in float64, without forming it: (Q_b U) diag(σ) (Q_a V)ᵀ.

    With B = Q_b R_b and Aᵀ = Q_a R_a, U, σ and V are those of the small matrix R_b R_aᵀ. Returns Q_b (out, k),
    U (k, l), σ (l) with the largest first, V (m, l) and Q_a (in, m); k, l and m are at most the rank of the factors.
    """
    with one_thread():
        q_b, r_b = torch.linalg.qr(B.double())
        q_a, r_a = torch.linalg.qr(A.double().T)
        u, sigma, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b, u, sigma, vh.T, q_a


def is_more_than_rounding(sigma: Tensor) -> Tensor:
    """Which singular values, the largest first, are directions that a delta really has."""
    return sigma > _NEGLIGIBLE * sigma[:1]


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The factorisation of a thin matrix waits for all threads at each of its columns: with two on a busy machine it
    took ten times as long as with one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _smallest_rank(sigma: Tensor, tolerance: float) -> int:
    """How many singular values leave at most ``tolerance`` of the norm behind; at least one."""
    lost = sigma.square().flip(0).cumsum(0).flip(0)  # lost[k]: what is gone when k are kept
    allowed = tolerance**2 * float(lost[0])
    return max(1, int((lost > allowed).sum()))


def factorise(matrix: Tensor, rank: int) -> Pair:
    """The best pair of a rank for a full matrix (out, in), by its singular value decomposition."""
    u, sigma, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return leading_pair(u, sigma, vh, rank)


def leading_pair(u: Tensor, sigma: Tensor, vh: Tensor, rank: int) -> Pair:
    """The leading directions of a decomposition U diag(σ) Vᵀ as a pair, √σ on both sides, in float32."""
    root = sigma[:rank].sqrt()
    return (root[:, None] * vh[:rank]).float(), (u[:, :rank] * root).float()


# -- other than the sum -----------------------------------------------------------------------------------------------


def magnitude_prune(factors: Sequence[Factors], *, density: float, **_: Any) -> Tensor:
    """Keep the ``density`` largest entries of each delta by magnitude, then add the deltas. Returns (out, in)."""
    return torch.stack([s * keep_largest(B.float() @ A.float(), density) for A, B, s in factors]).sum(0)


def dare_linear(factors: Sequence[Factors], *, density: float, seed: int, **_: Any) -> Tensor:
    """DARE (https://arxiv.org/abs/2311.03099): drop entries at random, rescale the rest by 1/density, add."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([s * _dropped(B.float() @ A.float(), density, generator) for A, B, s in factors]).sum(0)


def ties(factors: Sequence[Factors], *, density: float, **_: Any) -> Tensor:
    """TIES (https://arxiv.org/abs/2306.01708): trim each delta, elect a sign per entry, average what agrees with it."""
    return elect_and_average([s * keep_largest(B.float() @ A.float(), density) for A, B, s in factors])


def dare_ties(factors: Sequence[Factors], *, density: float, seed: int, **_: Any) -> Tensor:
    """DARE's random drop and rescale in the place of TIES' trim, then TIES' election and average."""
    generator = torch.Generator().manual_seed(seed)
    return elect_and_average([s * _dropped(B.float() @ A.float(), density, generator) for A, B, s in factors])


def keep_largest(matrix: Tensor, density: float) -> Tensor:
    """The matrix with all but its largest entries set to zero; exactly round(density · size) of them stay.

    By numpy's selection, which takes a tenth of the time of torch's ``topk``.
    """
    keep, size = round(density * matrix.numel()), matrix.abs().flatten()
    if keep == 0:
        return torch.zeros_like(matrix)
    place = size.numel() - keep
    least = float(np.partition(size.numpy(), place)[place])  # the smallest that stays
    kept = size >= least
    if more := int(kept.sum()) - keep:  # of equal ones, the first
        kept[(size == least).nonzero()[-more:]] = False
    return matrix * kept.view_as(matrix)


def _dropped(matrix: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry kept with probability ``density`` and divided by it, so that the expectation stays."""
    mask = torch.rand(matrix.shape, generator=generator) < density
    return matrix * mask.to(matrix) / density


def elect_and_average(matrices: Sequence[Tensor]) -> Tensor:
    """Per entry: the sign with the larger total magnitude wins, and the mean of those that carry it is taken.

    A block of rows at a time, which stays in a core's cache.
    """
    made = torch.empty_like(matrices[0])
    step = max(1, _BLOCK // max(1, made.shape[1]))
    for start in range(0, made.shape[0], step):
        stacked = torch.stack([matrix[start : start + step] for matrix in matrices])  # (members, rows, in)
        elected = torch.sign(stacked.sum(0))
        agrees = stacked * elected > 0
        made[start : start + step] = (stacked * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return made


def distance(made: Tensor, factors: Sequence[Factors]) -> float:
    """‖made - Σ sᵢ Bᵢ Aᵢ‖ of a full matrix (out, in), in float64, a block of rows at a time."""
    a = torch.cat([A.double() for A, _, _ in factors])
    b = torch.cat([B.double() * s for _, B, s in factors], dim=1)
    step, total = max(1, _BLOCK // max(1, made.shape[1])), 0.0
    for start in range(0, made.shape[0], step):
        total += float((made[start : start + step].double() - b[start : start + step] @ a).square().sum())
    return math.sqrt(total)


# -- norms, from the factors alone -----------------------------------------------------------------------------------


def product_norm(A: Tensor, B: Tensor) -> float:
    """Frobenius norm of B @ A: √trace((BᵀB)(AAᵀ)), in float64, without forming B @ A."""
    return math.sqrt(inner_product((A, B), (A, B)))


def inner_product(first: Pair, second: Pair) -> float:
    """⟨B₁A₁, B₂A₂⟩ = trace((B₂ᵀB₁)(A₁A₂ᵀ)), in float64, without forming a product; a square is never negative."""
    (A1, B1), (A2, B2) = ((A.double(), B.double()) for A, B in (first, second))
    value = float(((B1.T @ B2) * (A1 @ A2.T)).sum())
    return max(value, 0.0) if first[0] is second[0] and first[1] is second[1] else value


def relative_error(exact: Pair, other: Pair) -> float:
    """‖B'A' - BA‖ / ‖BA‖ in the Frobenius norm, from the factors alone."""
    (A, B), (A2, B2) = exact, other
    norm = product_norm(A, B)
    gap = product_norm(torch.cat([A2.double(), A.double()]), torch.cat([B2.double(), -B.double()], dim=1))
    return gap / norm if norm else 0.0
