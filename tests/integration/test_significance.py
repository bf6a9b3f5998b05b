"""How sure a mean is, and what a paired test says: against arithmetic by hand and every case tried one by one."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from stackctl.engine.evaluation.significance import RecordScore, paired_test, ratio_error, sign_flip_p


def scores(*losses: float, tokens: int = 1) -> list[RecordScore]:
    return [RecordScore(loss, tokens, 0) for loss in losses]


def test_the_error_with_records_of_equal_length_is_the_textbook_one() -> None:
    """Means 1, 2, 3, 6 nats: mean 3, s² = 14/3, so SE = √(14/3 / 4)."""
    assert ratio_error([10, 20, 30, 60], [10] * 4) == pytest.approx(math.sqrt(14 / 12))


def test_the_error_with_records_of_unlike_length_by_hand() -> None:
    """R = 9/6; what is left over: 2 - 1.5 = 0.5, 4 - 3 = 1, 3 - 4.5 = -1.5; √(3/2 · 3.5) / 6."""
    assert ratio_error([2, 4, 3], [1, 2, 3]) == pytest.approx(math.sqrt(1.5 * 3.5) / 6)
    assert ratio_error([2], [1]) is None


def test_the_error_is_how_much_the_mean_varies_from_sample_to_sample() -> None:
    draw = random.Random(5)

    def sample() -> tuple[list[float], list[int]]:
        sizes = [draw.randint(5, 60) for _ in range(80)]
        return [size * (2 + draw.gauss(0, 0.5)) for size in sizes], sizes

    samples = [sample() for _ in range(1500)]
    means = [sum(totals) / sum(sizes) for totals, sizes in samples]
    middle = sum(means) / len(means)
    spread = math.sqrt(sum((mean - middle) ** 2 for mean in means) / len(means))
    errors = [ratio_error(*one) or 0.0 for one in samples]
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.05)


def test_few_records_are_tried_every_way() -> None:
    gaps = [0.5, -0.1, 0.3, 0.2, 0.0, 0.7]
    ways = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in itertools.product((1, -1), repeat=6)]
    wanted = sum(way >= abs(sum(gaps)) - 1e-12 for way in ways) / 64
    assert sign_flip_p(gaps) == pytest.approx(wanted)
    assert sign_flip_p([1.0] * 5) == pytest.approx(2 / 32), "five records cannot show anything at 5 %"


def test_many_records_are_drawn_and_the_same_each_time() -> None:
    """With twenty equal gaps only the two ways without a change of sign reach the sum: p is next to nothing."""
    assert sign_flip_p([1.0] * 20) <= 3e-4
    noise = random.Random(1)
    gaps = [noise.gauss(0.3, 1) for _ in range(60)]
    assert sign_flip_p(gaps) == sign_flip_p(gaps)
    # For many records the sum is near a normal one with variance Σ gap²: erfc gives its two tails.
    wanted = math.erfc(abs(sum(gaps)) / math.sqrt(2 * sum(gap * gap for gap in gaps)))
    assert sign_flip_p(gaps) == pytest.approx(wanted, abs=0.02)


def test_no_difference_is_found_where_there_is_none_but_chance() -> None:
    """Of tests of pure noise, one in twenty is below 0.05."""
    draw = random.Random(3)
    low = sum(sign_flip_p([draw.gauss(0, 1) for _ in range(10)]) <= 0.05 for _ in range(400))
    assert 8 <= low <= 34


@pytest.mark.parametrize("count", [1, 5, 40])
def test_a_stack_against_itself(count: int) -> None:
    same = scores(*[0.1 * n for n in range(1, count + 1)])
    found = paired_test(same, same)
    assert (found.difference, found.p_value, found.records) == (0, 1, count)
    assert found.standard_error == (None if count == 1 else 0)


def test_the_difference_is_that_of_the_means_over_tokens() -> None:
    mine = [RecordScore(2.0, 1, 0), RecordScore(9.0, 4, 1), RecordScore(5.0, 3, 1)]
    theirs = [RecordScore(2.5, 1, 0), RecordScore(12.0, 4, 0), RecordScore(5.5, 3, 2)]
    found = paired_test(mine, theirs)
    assert found.difference == pytest.approx((16 - 20) / 8)
    # d = -0.5, -3, -0.5 less -0.5 a token: 0, -1, 1
    assert found.standard_error == pytest.approx(math.sqrt(3 / 2 * 2) / 8)
    assert found.p_value == pytest.approx(2 / 8)
    assert paired_test(theirs, mine).difference == -found.difference
    with pytest.raises(ValueError, match="same records"):
        paired_test(mine, mine[:2])
