"""The algebra against float64 computed straight from the factors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.engine import algebra

Factors = list[tuple[torch.Tensor, torch.Tensor, float]]


@st.composite
def members(draw: st.DrawFn, smallest: int = 1) -> Factors:
    """One to four members of unlike ranks on a module of some shape, with weights of either sign."""
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    found = []
    for _ in range(draw(st.integers(smallest, 4))):
        rank = draw(st.integers(1, 6))
        weight = draw(st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3))
        A = torch.randn(rank, columns, generator=generator)
        found.append((A, torch.randn(rows, rank, generator=generator), weight))
    return found


def exact(factors: Factors) -> torch.Tensor:
    """Σ s B A in float64, by the definition."""
    return torch.stack([s * (B.double() @ A.double()) for A, B, s in factors]).sum(0)


def distance(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made.double() - wanted).norm() / wanted.norm().clamp_min(1e-9))


@given(members())
def test_concatenation_is_the_sum(factors: Factors) -> None:
    a, b = algebra.concatenate(factors)
    scale = sum(abs(s) * float(A.norm() * B.norm()) for A, B, s in factors)
    assert float((b.double() @ a.double() - exact(factors)).norm()) <= 1e-6 * scale
    assert a.shape[0] == b.shape[1] == sum(A.shape[0] for A, _, _ in factors)


@given(members())
def test_delta_is_the_sum(factors: Factors) -> None:
    scale = sum(abs(s) * float(A.norm() * B.norm()) for A, B, s in factors)
    assert float((algebra.delta(factors).double() - exact(factors)).norm()) <= 1e-6 * scale


@given(members(smallest=2), st.randoms())
def test_the_order_of_members_changes_nothing(factors: Factors, random: object) -> None:
    shuffled = list(factors)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    torch.testing.assert_close(algebra.delta(shuffled), algebra.delta(factors), rtol=1e-4, atol=1e-4)


@given(members(), st.integers(1, 8))
def test_truncation_is_the_best_of_its_rank(factors: Factors, rank: int) -> None:
    """No matrix of that rank is nearer than the one that the singular values promise (Eckart and Young)."""
    wanted = exact(factors)
    a, b = algebra.truncate(factors, rank=rank)
    sigma = torch.linalg.svdvals(wanted)
    promised = float(sigma[min(rank, len(sigma)) :].norm())
    assert a.shape[0] <= rank
    assert float((b.double() @ a.double() - wanted).norm()) == pytest.approx(
        promised, abs=1e-5 * float(sigma[0]) + 1e-9
    )


@given(members(), st.floats(0.001, 0.9))
def test_the_automatic_rank_is_the_smallest_within_tolerance(factors: Factors, tolerance: float) -> None:
    wanted = exact(factors)
    sigma = torch.linalg.svdvals(wanted)
    a, b = algebra.truncate(factors, rank="auto", tolerance=tolerance)
    rank = a.shape[0]
    assert distance(b.double() @ a.double(), wanted) <= tolerance + 1e-5
    if rank > 1:
        assert float(sigma[rank - 1 :].norm() / sigma.norm()) > tolerance - 1e-6


@given(members())
def test_everything_kept_makes_pruning_the_sum(factors: Factors) -> None:
    wanted = exact(factors)
    for made in (
        algebra.magnitude_prune(factors, density=1.0),
        algebra.dare_linear(factors, density=1.0, seed=0),
    ):
        torch.testing.assert_close(made.double(), wanted, rtol=1e-4, atol=1e-4)


@given(members(), st.floats(0.05, 1.0))
def test_pruning_keeps_the_largest_entries_and_just_so_many(factors: Factors, density: float) -> None:
    A, B, s = factors[0]
    full = s * (B @ A)
    made = algebra.magnitude_prune(factors[:1], density=density)
    kept = made != 0
    assert int(kept.sum()) == round(density * full.numel())
    if kept.any() and not kept.all():
        assert float(full[kept].abs().min()) >= float(full[~kept].abs().max()) - 1e-6
    torch.testing.assert_close(made[kept], full[kept])


@given(members(), st.floats(0.1, 0.9), st.integers(0, 2**31))
def test_dare_drops_and_rescales_and_is_repeatable(factors: Factors, density: float, seed: int) -> None:
    A, B, s = factors[0]
    made = algebra.dare_linear(factors[:1], density=density, seed=seed)
    kept = made != 0
    torch.testing.assert_close(made[kept], (s * (B @ A) / density)[kept], rtol=1e-4, atol=1e-5)
    assert torch.equal(made, algebra.dare_linear(factors[:1], density=density, seed=seed))


def test_dare_keeps_the_expectation() -> None:
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(4, 40, generator=generator), torch.randn(40, 4, generator=generator)
    drawn = torch.stack([algebra.dare_linear([(A, B, 1.0)], density=0.3, seed=seed) for seed in range(400)])
    assert distance(drawn.mean(0), (B @ A).double()) < 0.12  # 1/√400 · √(0.7/0.3) = 0.076 expected


@given(members(smallest=2))
def test_ties_averages_only_what_agrees_with_the_elected_sign(factors: Factors) -> None:
    """Entry by entry against the paper's definition, in plain Python."""
    deltas = [s * (B @ A) for A, B, s in factors]
    made = algebra.ties(factors, density=1.0)
    for row in range(made.shape[0]):
        for column in range(made.shape[1]):
            values = [float(d[row, column]) for d in deltas]
            total = sum(values)
            if abs(total) < 1e-4:  # the election is a matter of rounding
                continue
            agreeing = [v for v in values if v * total > 0]
            assert float(made[row, column]) == pytest.approx(sum(agreeing) / len(agreeing), rel=1e-3, abs=1e-4)


@given(members(smallest=2))
def test_norms_and_errors_from_factors_are_those_of_the_products(factors: Factors) -> None:
    pair = algebra.concatenate(factors)
    (A1, B1, s1), (A2, B2, s2) = factors[:2]
    first, second = algebra.concatenate([(A1, B1, s1)]), algebra.concatenate([(A2, B2, s2)])
    products = [b.double() @ a.double() for a, b in (pair, first, second)]
    assert algebra.product_norm(*pair) == pytest.approx(float(products[0].norm()), rel=1e-6, abs=1e-6)
    size = float(products[1].norm() * products[2].norm())
    assert algebra.inner_product(first, second) == pytest.approx(
        float((products[1] * products[2]).sum()), abs=1e-9 + 1e-9 * size
    )
    if float(products[0].norm()) > 1e-3 * float(products[1].norm()):
        assert algebra.relative_error(pair, first) == pytest.approx(
            distance(products[1], products[0]), rel=1e-4, abs=1e-6
        )


@settings(max_examples=25)
@given(members(), st.integers(1, 12))
def test_a_full_matrix_is_factorised_as_well_as_its_rank_allows(factors: Factors, rank: int) -> None:
    full = algebra.delta(factors)
    a, b = algebra.factorise(full, rank)
    sigma = torch.linalg.svdvals(full.double())
    assert float((b @ a - full).norm()) == pytest.approx(float(sigma[rank:].norm()), abs=1e-5 * float(sigma[0]) + 1e-6)
