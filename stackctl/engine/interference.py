"""How much the members of a stack interfere, pair by pair and module by module, from the factors alone.

For two deltas ΔW₁ and ΔW₂ on one module, with ranks k₁ and k₂ and singular value decompositions ΔWᵢ = Uᵢ Σᵢ Vᵢᵀ:

- The cosines of the principal angles between their column spaces are the singular values of U₁ᵀU₂ (Björck and Golub,
  Numerical methods for computing angles between linear subspaces, Mathematics of Computation 27, 1973). The overlap
  is the sum of their squares over the smaller dimension, ‖U₁ᵀU₂‖² / min(k₁, k₂): 1 where one space holds the other, 0
  where they are orthogonal. It is how the paper on LoRA compares subspaces (https://arxiv.org/abs/2106.09685, section
  7.2). That of the row spaces is ‖V₁ᵀV₂‖² / min(k₁, k₂).
- Random spaces overlap, too: of dimensions k₁ and k₂ in n dimensions, by max(k₁, k₂) / n on average.
- The cosine ⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖) in the Frobenius inner product is σ̂₁ᵀ (U₁ᵀU₂ ∘ V₁ᵀV₂) σ̂₂, with σ̂ᵢ the singular
  values over their norm, and the sign of both weights. Where either overlap is 0, so is the cosine: deltas that write
  to other places, or read from others, do not interfere.

Spaces are those of the deltas, not of their factors: a factor B that is zero, or columns that A never reaches, span
nothing. What is below a millionth of the largest singular value is rounding of the factors, and counts as nothing. Of
an embedding, where the delta is stored transposed, columns are all the same what is written (B) and rows what is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stackctl.engine import algebra
from stackctl.engine.merging import matrices
from stackctl.engine.overlaps import Interference, ModuleOverlap, NotCompared, Overlap, PairOverlap
from stackctl.engine.tensors import MemberTensors
from stackctl.plan.stack_plan import StackPlan

_COMPARABLE = {"same_adapter_twice", "not_weighable"}
"""Problems of a member that do not keep its deltas from being what they are."""


def measure_interference(plan: StackPlan) -> Interference:
    """Compare every two members on every module that both change; what cannot be compared is named.

    Reads one module's factors at a time, and forms nothing of a delta's size.

    Raises:
        VerificationFailed: a tensor is cut off or not finite.
    """
    left_out = list(_left_out(plan))
    without = {left.member for left in left_out if left.module is None}
    members = [index for index, member in enumerate(plan.members) if member.label not in without]
    found: dict[tuple[int, int], list[ModuleOverlap]] = {pair: [] for pair in itertools.combinations(members, 2)}
    touched: dict[int, int] = dict.fromkeys(members, 0)
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for module in plan.modules.values():
            factors = tuple(factor for factor in module.factors if factor.member in touched)
            for factor in factors:
                touched[factor.member] += module.experts
            if len(factors) < 2:
                continue
            read = tensors.factors(replace(module, factors=factors))
            for expert, matrix in enumerate(matrices(module, read)):
                name = f"{module.name}.{expert}" if module.is_experts else module.name
                deltas = {f.member: _decompose(*pair) for f, pair in zip(factors, matrix, strict=True)}
                for first, second in itertools.combinations(deltas, 2):
                    ranks = deltas[first].rank, deltas[second].rank
                    overlap = _compare(deltas[first], deltas[second])
                    found[first, second].append(ModuleOverlap(name, ranks, overlap))
    pairs = []
    for (first, second), overlaps in found.items():
        labels = plan.members[first].label, plan.members[second].label
        unshared = touched[first] - len(overlaps), touched[second] - len(overlaps)
        pairs.append(PairOverlap(labels, tuple(overlaps), unshared))
    return Interference(tuple(pairs), tuple(left_out))


def _left_out(plan: StackPlan) -> Iterator[NotCompared]:
    """Members whose effect is no delta that could be compared, and what members bring whole."""
    for member in plan.members:
        reasons = [p.message for p in plan.errors if p.member == member.label and p.code not in _COMPARABLE]
        if not member.is_used:
            reasons.append(f"{member.label} has weight 0 and changes nothing")
        if reasons:
            yield NotCompared(member.label, None, "; ".join(reasons))
    for replacement in plan.replacements:
        label = plan.members[replacement.member].label
        yield NotCompared(label, replacement.parameter, "it comes whole (modules_to_save or bias), not as a delta")
    for rows in plan.token_rows:
        label = plan.members[rows.member].label
        yield NotCompared(label, rows.module, "rows of single tokens, of which no two members train the same")


@dataclass(frozen=True)
class _Delta:
    """ΔW = scale · (q_b @ u) @ diag(sigma) @ (q_a @ v)ᵀ: two orthonormal bases of the size of a factor, (out, r) and
    (in, r), and within them the directions that the delta really has."""

    q_b: Tensor
    u: Tensor
    sigma: Tensor
    v: Tensor
    q_a: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.sigma.numel()

    @property
    def norm(self) -> float:
        return abs(self.scale) * float(self.sigma.norm())


def _decompose(A: Tensor, B: Tensor, scale: float) -> _Delta:
    q_b, u, sigma, v, q_a = algebra.thin_svd(A, B)
    rank = int(algebra.is_more_than_rounding(sigma).sum())
    return _Delta(q_b, u[:, :rank], sigma[:rank], v[:, :rank], q_a, scale)


def _compare(first: _Delta, second: _Delta) -> Overlap:
    norms = (first.norm, second.norm)
    if not all(norms):
        return Overlap(norms, None, None, None, None, None)
    columns = first.u.T @ (first.q_b.T @ second.q_b) @ second.u  # U₁ᵀU₂, (k₁, k₂)
    rows = first.v.T @ (first.q_a.T @ second.q_a) @ second.v  # V₁ᵀV₂, (k₁, k₂)
    small, large = sorted((first.rank, second.rank))
    inner = float((first.sigma / first.sigma.norm()) @ (columns * rows) @ (second.sigma / second.sigma.norm()))
    cosine = inner if (first.scale > 0) == (second.scale > 0) else -inner
    return Overlap(
        norms, max(-1.0, min(1.0, cosine)), _share(columns, small), _share(rows, small),
        min(1.0, large / first.q_b.shape[0]), min(1.0, large / first.q_a.shape[0]),
    )  # fmt: skip


def _share(cosines: Tensor, dimension: int) -> float:
    """Σ cos² of the principal angles over the smaller dimension; never more than 1 by rounding."""
    return min(1.0, float(cosines.square().sum()) / dimension)
