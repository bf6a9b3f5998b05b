"""Aligned merging on small cores against the same methods in full size: float64 deltas and their whole decompositions.

Each oracle is written from its paper and the paper's code, on matrices (out, in), and knows nothing of factors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.engine import aligned_merging

Factors = list[tuple[torch.Tensor, torch.Tensor, float]]
METHODS: dict[str, dict[str, float]] = {
    "knots_ties": {"density": 0.4}, "tsv": {}, "iso_c": {}, "core_ties": {"density": 0.4},
}  # fmt: skip


@st.composite
def members(draw: st.DrawFn, smallest: int = 1) -> Factors:
    """One to four members of unlike ranks with weights of either sign, of which two may read the very same."""
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    found: Factors = []
    for _ in range(draw(st.integers(smallest, 4))):
        rank, weight = draw(st.integers(1, 6)), draw(st.floats(-3, 3).filter(lambda w: abs(w) > 0.05))
        A = torch.randn(rank, columns, generator=generator)
        B = torch.randn(rows, rank, generator=generator)
        if found and draw(st.booleans()):
            A = found[0][0][:rank]
            B = B[:, : A.shape[0]]
        found.append((A, B, weight))
    return found


def deltas(factors: Factors) -> list[torch.Tensor]:
    return [s * (B.double() @ A.double()) for A, B, s in factors]


def directions(sigma: torch.Tensor) -> int:
    return int((sigma > 1e-6 * sigma[0]).sum())


def trimmed_elected_averaged(matrices: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES entry by entry (2306.01708, algorithm 1), with a threshold at the smallest entry that stays."""
    keep = round(density * matrices[0].numel())
    trimmed = []
    for matrix in matrices:
        flat = matrix.abs().flatten().sort(descending=True).values
        trimmed.append(matrix * (matrix.abs() >= flat[keep - 1]) if keep else torch.zeros_like(matrix))
    sign = torch.sign(sum(trimmed))
    agreeing = [torch.where(torch.sign(matrix) == sign, matrix, 0) for matrix in trimmed]
    count = sum((matrix != 0).double() for matrix in agreeing)
    return sum(agreeing) / torch.clamp(count, min=1)  # type: ignore[operator]


def full_knots_ties(factors: Factors, density: float) -> torch.Tensor:
    """KnOTS, equation 4: the decomposition of the deltas side by side, TIES on what stands behind U."""
    wide = torch.cat(deltas(factors), dim=1)
    u, sigma, vh = torch.linalg.svd(wide, full_matrices=False)
    k = directions(sigma)
    parts = (sigma[:k, None] * vh[:k]).split(wide.shape[1] // len(factors), dim=1)
    return u[:, :k] @ trimmed_elected_averaged(list(parts), density)


def full_tsv(factors: Factors) -> torch.Tensor:
    """TSV-M, algorithm 1: the leading 1/n of every member's singular vectors, each side made orthogonal."""
    found = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas(factors)]
    share = max(1, min(factors[0][1].shape[0], factors[0][0].shape[1]) // len(factors))
    kept = [min(share, directions(sigma)) for _, sigma, _ in found]
    u = torch.cat([u[:, :k] for (u, _, _), k in zip(found, kept, strict=True)], 1)
    sigma = torch.cat([sigma[:k] for (_, sigma, _), k in zip(found, kept, strict=True)])
    vh = torch.cat([vh[:k] for (_, _, vh), k in zip(found, kept, strict=True)], 0)
    return procrustes(u) @ torch.diag(sigma) @ procrustes(vh)


def procrustes(matrix: torch.Tensor) -> torch.Tensor:
    p, d, q = torch.linalg.svd(matrix, full_matrices=False)
    return p[:, : directions(d)] @ q[: directions(d)]


def full_iso_c(factors: Factors) -> torch.Tensor:
    """Iso-C, equation 7: one value, the mean, in the place of all singular values of the sum."""
    u, sigma, vh = torch.linalg.svd(sum(deltas(factors)), full_matrices=False)  # type: ignore[arg-type]
    k = directions(sigma)
    return sigma[:k].mean() * (u[:, :k] @ vh[:k])


def full_core_ties(factors: Factors, density: float) -> torch.Tensor:
    """Core Space, section 3: reference bases of the stacked factors, each delta seen in them, TIES there, and back."""
    u = torch.linalg.svd(torch.cat([B.double() for _, B, _ in factors], 1), full_matrices=False)[0]
    vh = torch.linalg.svd(torch.cat([A.double() for A, _, _ in factors], 0), full_matrices=False)[2]
    return u @ trimmed_elected_averaged([u.T @ delta @ vh.T for delta in deltas(factors)], density) @ vh


ORACLES: dict[str, Callable[..., torch.Tensor]] = {
    "knots_ties": full_knots_ties, "tsv": full_tsv, "iso_c": full_iso_c, "core_ties": full_core_ties,
}  # fmt: skip


def merge(method: str, factors: Factors, **options: float) -> torch.Tensor:
    """B @ A in float64, of a pair that has just the rank that a plan gives it."""
    a, b = getattr(aligned_merging, method)(factors, **{**METHODS[method], **options})
    assert a.dtype == b.dtype == torch.float32
    rows, columns = factors[0][1].shape[0], factors[0][0].shape[1]
    rank = min(sum(A.shape[0] for A, _, _ in factors), rows, columns, int(options.get("rank", 1 << 30)))
    assert (a.shape, b.shape) == ((rank, columns), (rows, rank))
    return b.double() @ a.double()


def size(factors: Factors) -> float:
    return sum(float(delta.norm()) for delta in deltas(factors))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=60, deadline=None)
@given(factors=members())
def test_the_small_cores_give_what_the_full_matrices_give(method: str, factors: Factors) -> None:
    wanted = ORACLES[method](factors, **METHODS[method])
    assert float((merge(method, factors) - wanted).norm()) <= 1e-6 * size(factors)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(factors=members(smallest=2))
def test_the_order_of_members_changes_no_bit(method: str, factors: Factors) -> None:
    first = merge(method, factors)
    for order in itertools.permutations(factors):
        assert torch.equal(merge(method, list(order)), first)


@pytest.mark.parametrize("method", ["knots_ties", "core_ties"])
@given(factors=members(), density=st.floats(0.05, 1.0))
@settings(max_examples=40, deadline=None)
def test_the_share_that_stays_is_the_one_that_was_asked_for(method: str, factors: Factors, density: float) -> None:
    wanted = ORACLES[method](factors, density)
    assert float((merge(method, factors, density=density) - wanted).norm()) <= 1e-6 * size(factors)


@pytest.mark.parametrize("method", METHODS)
@given(factors=members(), rank=st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_a_rank_cuts_the_result_where_that_loses_least(method: str, factors: Factors, rank: int) -> None:
    whole, cut = merge(method, factors), merge(method, factors, rank=rank)
    sigma = torch.linalg.svdvals(whole)
    assert float((cut - whole).norm()) == pytest.approx(float(sigma[rank:].norm()), abs=2e-6 * size(factors))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=20, deadline=None)
@given(factors=members())
def test_weights_of_all_members_scale_the_result(method: str, factors: Factors) -> None:
    doubled = [(A, B, 2 * s) for A, B, s in factors]
    assert float((merge(method, doubled) - 2 * merge(method, factors)).norm()) <= 2e-6 * size(factors)


@pytest.mark.parametrize("method", METHODS)
def test_members_without_effect_make_nothing(method: str) -> None:
    nothing = [(torch.randn(rank, 9), torch.zeros(7, rank), 1.0) for rank in (2, 3)]
    assert not merge(method, nothing).any()


def test_members_that_write_and_read_apart_are_added_by_tsv() -> None:
    """What is orthogonal already stays as it is, so that nothing but the sum is left."""
    eye = torch.eye(20)
    factors = [(eye[:3] * 2, eye[:, :3], 1.0), (eye[5:9], eye[:, 8:12], -0.5)]
    wanted = sum(deltas(factors))
    torch.testing.assert_close(merge("tsv", factors), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["knots_ties", "core_ties"])
def test_members_that_read_apart_do_not_halve_one_another(method: str) -> None:
    """Whatever rounding leaves of a member where it is nothing, it agrees with nobody there."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 3, 20, generator=generator), torch.randn(2, 24, 3, generator=generator)
    A[0, :, 10:], A[1, :, :10] = 0, 0
    factors = [(A[0], B[0], 1.0), (A[1], B[1], -0.5)]
    torch.testing.assert_close(merge(method, factors, density=1.0), sum(deltas(factors)), rtol=0, atol=1e-5)


def test_one_member_alone_is_itself_by_tsv() -> None:
    A, B = torch.randn(4, 12), torch.randn(15, 4)
    torch.testing.assert_close(merge("tsv", [(A, B, 0.7)]), 0.7 * (B.double() @ A.double()), rtol=0, atol=1e-5)


def test_core_ties_is_another_method_than_ties() -> None:
    """On the deltas themselves the same trimming and electing gives something else."""
    generator = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(4, 30, generator=generator), torch.randn(30, 4, generator=generator), 1.0) for _ in range(2)
    ]
    plain = trimmed_elected_averaged(deltas(factors), 0.4)
    assert float((merge("core_ties", factors) - plain).norm() / plain.norm()) > 0.1
