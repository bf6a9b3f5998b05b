"""Which rows attend together: the cheapest way of all there are, by counts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest

from stackctl.engine.generation.kv_cache import _CALL, attention_groups


def ways(count: int) -> Iterator[list[int]]:
    for cuts in itertools.product([False, True], repeat=count - 1):
        sizes = [1]
        for cut in cuts:
            if cut:
                sizes.append(1)
            else:
                sizes[-1] += 1
        yield sizes


def cost(lengths: Sequence[int], sizes: Sequence[int], call: int) -> int:
    taken = iter(lengths)
    return sum(call + size * max(itertools.islice(taken, size)) for size in sizes)


@pytest.mark.parametrize("width", [_CALL // 400, _CALL // 50, _CALL // 5])
def test_no_other_way_is_cheaper(width: int) -> None:
    draws, call = random.Random(width), -(-_CALL // width)
    for _ in range(20):
        lengths = [draws.randint(1, 300) for _ in range(draws.randint(1, 9))]
        sizes, found = attention_groups(lengths, width)
        assert sum(sizes) == len(lengths)
        assert found == cost(lengths, sizes, call) == min(cost(lengths, way, call) for way in ways(len(lengths)))


def test_rows_of_like_length_stay_together_and_unlike_ones_do_not() -> None:
    assert attention_groups([100] * 32, 192)[0] == [32]
    assert attention_groups([50] * 16 + [900] * 16, 192)[0] == [16, 16]
    assert attention_groups([20, 24, 22, 21], 192)[0] == [4], "a call costs more than a few columns"


def test_one_more_token_in_every_row_changes_nothing() -> None:
    lengths = [3, 80, 12, 400, 410, 390, 7]
    assert attention_groups(lengths, 192)[0] == attention_groups([length + 57 for length in lengths], 192)[0]
