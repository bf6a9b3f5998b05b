"""Aligned merging: members are brought into common bases first, and are merged there.

With QR decompositions of all factors side by side, [B₁ … Bₙ] = Q_b R_b and [A₁ᵀ … Aₙᵀ] = Q_a R_a, every member is
Q_b Mᵢ Q_aᵀ, and its core Mᵢ = sᵢ R_bᵢ R_aᵢᵀ has at most Σ rank rows and columns. All of it is in float64, nothing of
the size of a delta is formed, and ranks may differ. The order of the members changes nothing, to the last bit.

Directions below a millionth of the largest singular value are rounding, and count as none. So do entries below a
trillionth of their member: where one neither writes nor reads, rounding would make it agree with another or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stackctl.engine.algebra import Factors, Pair, elect_and_average, is_more_than_rounding, keep_largest, one_thread

_NO_ENTRY = 1e-12


@dataclass(frozen=True)
class _Cores:
    """Members i in common bases: columns (out, k) @ cores[i] (k, l) @ rows (l, in), both bases orthonormal.

    ``r_b`` (k, Σ rank) and ``r_a`` (l, Σ rank) are the stacked factors in these bases, each as it is stored.
    """

    columns: Tensor
    rows: Tensor
    cores: list[Tensor]
    r_b: Tensor
    r_a: Tensor

    def pair(self, core: Tensor, rank: int | None) -> Pair:
        """columns @ core @ rows as A (rank, in) and B (out, rank); cut to a rank where that loses least."""
        return _pair(self.columns, core, self.rows, min(rank or self.r_b.shape[1], *core.shape))


def _cores(factors: Sequence[Factors]) -> _Cores:
    factors = sorted(factors, key=_place)
    q_b, r_b = torch.linalg.qr(torch.cat([B.double() for _, B, _ in factors], dim=1))
    q_a, r_a = torch.linalg.qr(torch.cat([A.double() for A, _, _ in factors]).T)
    ranks = [A.shape[0] for A, _, _ in factors]
    parts = zip(r_b.split(ranks, dim=1), r_a.split(ranks, dim=1), factors, strict=True)
    return _Cores(q_b, q_a.T, [s * (b @ a.T) for b, a, (_, _, s) in parts], r_b, r_a)


def _place(factors: Factors) -> tuple[float, ...]:
    """Where a member stands in an order that depends on what the members are, and not on how they were named."""
    A, B, s = factors
    return s, A.shape[0], float(A.double().sum()), float(B.double().sum())


def _pair(left: Tensor, core: Tensor, right: Tensor, rank: int) -> Pair:
    """left @ core @ right as a pair of just this rank, filled up with zeros, its size shared out over both factors."""
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    root = sigma[:rank].sqrt()
    a, b = root[:, None] * (vh[:rank] @ right), (left @ u[:, :rank]) * root
    missing = rank - len(root)
    return functional.pad(a, (0, 0, 0, missing)).float(), functional.pad(b, (0, missing)).float()


def _ties(aligned: Sequence[Tensor], density: float) -> Tensor:
    """TIES of members in common bases."""
    kept = [keep_largest(matrix, density) for matrix in aligned]
    return elect_and_average([m * (m.abs() > _NO_ENTRY * torch.linalg.vector_norm(m)) for m in kept])


def knots_ties(factors: Sequence[Factors], *, density: float, rank: int | None = None, **_: Any) -> Pair:
    """TIES on members aligned by KnOTS (https://arxiv.org/abs/2410.19735): [ΔW₁ … ΔWₙ] = U Σ [V₁ᵀ … Vₙᵀ], TIES of ΣVᵢᵀ.

    As in its code, what TIES sees are the ΣVᵢᵀ (directions, in), side by side along the input, of directions with a
    singular value above rounding (its code: above 1e-5), and what agrees with the elected sign is averaged. Its code
    trims over all modules together and tunes the share that stays (topK, 20 to 100 %); here, as in that of Core Space,
    every module is trimmed by itself. Returns A (rank, in) and B (out, rank).
    """
    with one_thread():
        found = _cores(factors)
        u, sigma, _ = torch.linalg.svd(torch.cat(found.cores, dim=1), full_matrices=False)
        u = u[:, is_more_than_rounding(sigma)]
        aligned = [u.T @ core @ found.rows for core in found.cores]  # ΣVᵢᵀ, (directions, in)
        q, r = torch.linalg.qr(_ties(aligned, density).T)
        most = min(found.r_b.shape[1], found.columns.shape[0], found.rows.shape[1])
        return _pair(found.columns @ u, r.T, q.T, min(rank or most, most))


def tsv(factors: Sequence[Factors], *, rank: int | None = None, **_: Any) -> Pair:
    """TSV-Merge (https://arxiv.org/abs/2412.00081): singular vectors of all members, made orthogonal to one another.

    Of each ΔWᵢ = Uᵢ Σᵢ Vᵢᵀ the leading 1/n of min(out, in) directions stay, n the members on the module, which of a
    LoRA are nearly always all; [U₁ … Uₙ] and [V₁ … Vₙ] become the nearest matrices with orthonormal columns
    (Procrustes: of P D Qᵀ it is P Qᵀ), and the singular values stand between them as they are. Its code takes vectors
    of singular values zero as well, whose direction is anybody's; here there are none. Returns A (rank, in) and
    B (out, rank).
    """
    with one_thread():
        found = _cores(factors)
        share = max(1, min(found.columns.shape[0], found.rows.shape[1]) // len(found.cores))
        parts = [torch.linalg.svd(core, full_matrices=False) for core in found.cores]
        kept = [min(share, int(is_more_than_rounding(sigma).sum())) for _, sigma, _ in parts]
        u = _orthogonal(torch.cat([u[:, :k] for (u, _, _), k in zip(parts, kept, strict=True)], dim=1))
        sigma = torch.cat([sigma[:k] for (_, sigma, _), k in zip(parts, kept, strict=True)])
        vh = _orthogonal(torch.cat([vh[:k] for (_, _, vh), k in zip(parts, kept, strict=True)]))
        return found.pair(u * sigma @ vh, rank)


def _orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix's polar decomposition; on what the matrix does not reach, zero."""
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    kept = is_more_than_rounding(sigma)
    nearest: Tensor = u[:, kept] @ vh[kept]
    return nearest


def iso_c(factors: Sequence[Factors], *, rank: int | None = None, **_: Any) -> Pair:
    """Iso-C (https://arxiv.org/abs/2502.04959): the sum of the members, with all its singular values their mean.

    Its code takes the mean over min(out, in) values of a full matrix. Nearly all of those of a sum of LoRAs are zero,
    and their directions anybody's; here, as in the code of Core Space, the mean is over the directions that the sum
    has. ``rank`` keeps those that were largest. Returns A (rank, in) and B (out, rank).
    """
    with one_thread():
        found = _cores(factors)
        u, sigma, vh = torch.linalg.svd(torch.stack(found.cores).sum(0), full_matrices=False)
        kept = int(is_more_than_rounding(sigma).sum())
        mean = sigma[:kept].mean() if kept else sigma.new_zeros(())
        kept = min(rank or kept, kept)
        return found.pair(mean * (u[:, :kept] @ vh[:kept]), rank)


def core_ties(factors: Sequence[Factors], *, density: float, rank: int | None = None, **_: Any) -> Pair:
    """TIES in Core Space (https://arxiv.org/abs/2509.17786): on what the members are in common singular bases.

    Another method than TIES on the deltas: what is trimmed and elected are entries of Uᵀ ΔWᵢ V, with U the left
    singular vectors of [B₁ … Bₙ] and V the right ones of [A₁; …; Aₙ], each factor as it is stored. As in its code,
    every module is trimmed by itself and what agrees is averaged; the share that stays it tunes (topK, 10 to 100 %).
    Returns A (rank, in) and B (out, rank).
    """
    with one_thread():
        found = _cores(factors)
        u, v = (torch.linalg.svd(stacked, full_matrices=False)[0] for stacked in (found.r_b, found.r_a))
        merged = _ties([u.T @ core @ v for core in found.cores], density)
        return found.pair(u @ merged @ v.T, rank)
