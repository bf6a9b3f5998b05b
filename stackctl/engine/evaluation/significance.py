"""How sure a mean loss is, and whether two stacks differ on the same records.

A record is the unit: its tokens hang together, so that the error of a mean over tokens is estimated from what the
records say, not from what the tokens say (Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, §2.2 and §4.2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_EXACT = 14
"""With at most this many records every way to flip their signs is tried: 2^14."""
_DRAWS = 9_999
_CHUNK = 1 << 22
"""Signs drawn at once: bounds the memory for many records."""
_TIE = 1e-9
"""Sums that differ by less than this share are the same sum in another order."""


@dataclass(frozen=True, slots=True)
class RecordScore:
    """What one record's supervised tokens came to.

    ``loss`` is their summed cross-entropy (nats), ``correct`` how many were the most likely token.
    """

    loss: float
    tokens: int
    correct: int


@dataclass(frozen=True)
class PairedTest:
    """One stack's mean loss less another's, on the same records: negative is better.

    ``standard_error`` is None with a single record. ``p_value``: how often chance alone would show a difference as
    large, were the two equally good.
    """

    difference: float
    standard_error: float | None
    p_value: float
    records: int


@dataclass(frozen=True)
class Ranking:
    """How a model ranks pairs of answers, compared with another: each number with its standard error.

    ``accuracy``: the share of pairs whose chosen answer it prefers more than the other does, equal ones counting one
    half. ``margin``: by how much on average, in nats. The errors are None with a single pair.
    """

    accuracy: float
    accuracy_error: float | None
    margin: float
    margin_error: float | None
    pairs: int


def ranking(gaps: Sequence[float], others: Sequence[float]) -> Ranking:
    """What ``gaps`` say, log-probability of the chosen less that of the rejected answer, beside another model's."""
    margins = [gap - other for gap, other in zip(gaps, others, strict=True)]
    right = [0.5 if margin == 0 else float(margin > 0) for margin in margins]
    ones = [1] * len(margins)
    means = [math.fsum(values) / len(values) for values in (right, margins)]
    return Ranking(means[0], ratio_error(right, ones), means[1], ratio_error(margins, ones), len(margins))


def ratio_error(totals: Sequence[float], sizes: Sequence[float]) -> float | None:
    """The standard error of Σ totals / Σ sizes over n records, each a cluster; None for fewer than two.

    With R = Σ y / Σ m:  SE = √( n/(n-1) · Σ (y_i - R·m_i)² ) / Σ m,  the ratio estimator's (Cochran 1977, "Sampling
    Techniques", 3rd ed., §6.4, with the records as a sample of far more).
    """
    count = len(totals)
    if count < 2:
        return None
    weight = math.fsum(sizes)
    ratio = math.fsum(totals) / weight
    squares = math.fsum((total - ratio * size) ** 2 for total, size in zip(totals, sizes, strict=True))
    return math.sqrt(count / (count - 1) * squares) / weight


def paired_test(scores: Sequence[RecordScore], others: Sequence[RecordScore]) -> PairedTest:
    """Compare the mean losses of two stacks on the same records, in the same order.

    The p-value is that of a two-sided sign-flip test (Fisher's randomisation test for pairs): if the stacks were
    equally good, each record's difference might as well have had the other sign. All 2^n flips are tried for up to 14
    records, else 9,999 drawn with a fixed seed, where the one observed is counted too (Phipson and Smyth 2010).

    Raises:
        ValueError: these are not the same records.
    """
    sizes = [score.tokens for score in scores]
    if sizes != [other.tokens for other in others]:
        raise ValueError("a paired test needs the same records on both sides")
    gaps = [score.loss - other.loss for score, other in zip(scores, others, strict=True)]
    return PairedTest(
        math.fsum(gaps) / math.fsum(sizes), ratio_error(gaps, sizes), sign_flip_p(gaps), len(gaps)
    )  # fmt: skip


def sign_flip_p(gaps: Sequence[float]) -> float:
    """The two-sided p-value of Σ gaps when every gap's sign is a coin's."""
    return best_of_many_p([gaps])[0]


def best_of_many_p(candidates: Sequence[Sequence[float]]) -> list[float]:
    """Two-sided p-values of Σ gaps of several candidates on the same records, for whoever picks the best of them.

    Who looks at twenty finds one that is better by chance. Here a record's sign is one coin for all candidates, and
    what is observed of each stands against the *largest* of all under every flip: the chance that any of them looks as
    good, were all alike (Westfall and Young 1993, "Resampling-Based Multiple Testing", single-step maxT). Sums are
    compared in units of √(Σ gaps²), which no flip changes. Of one candidate it is :func:`sign_flip_p`.
    """
    values = np.asarray(candidates, dtype=np.float64).T  # (records, candidates)
    norms = np.sqrt(np.square(values).sum(0))
    values = values / np.where(norms > 0, norms, 1.0)
    least = np.abs([math.fsum(column) for column in values.T]) - _TIE * np.abs(values).sum(0)
    count = len(values)
    if count <= _EXACT:
        bits = np.arange(1 << count)[:, None] >> np.arange(count) & 1  # (2^n, n)
        largest = np.abs((2.0 * bits - 1.0) @ values).max(1)
        return [float(np.mean(largest >= own)) for own in least]
    random = np.random.default_rng(0)
    beyond, left = np.zeros(len(least), dtype=np.int64), _DRAWS
    while left:
        rows = min(left, max(1, _CHUNK // count))
        signs = random.integers(0, 2, (rows, count), dtype=np.int8) * 2.0 - 1.0
        beyond += (np.abs(signs @ values).max(1)[:, None] >= least).sum(0)
        left -= rows
    return [(int(number) + 1) / (_DRAWS + 1) for number in beyond]
