"""Parts of a stack that make it go wrong are found wherever they stand, in few evaluations."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from stackctl.plan.bisection import Found, Off, StackPart
from stackctl.plan.bisection import find_culprits as find

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


class Told:
    """Bad or not, by a predicate; what was asked for."""

    def __init__(self, is_bad: Callable[[Off], bool]) -> None:
        self._is_bad, self.asked = is_bad, list[Off]()

    def score(self, off: Off) -> float:
        self.asked.append(off)
        return float(self._is_bad(off))

    def threshold(self, off: Off) -> float | None:
        return None if self._is_bad(off) or not self._is_bad(frozenset()) else 0.5


def find_culprits(parts: list[StackPart], is_bad: Callable[[Off], bool]) -> Found:
    return find(parts, Told(is_bad))


def stack(members: int, layers: int, kinds: int, outside: int = 0) -> list[StackPart]:
    return [
        StackPart(member, module)
        for member in range(members)
        for module in [
            *(f"model.layers.{layer}.{kind}" for layer in range(layers) for kind in KINDS[:kinds]),
            *(f"head{n}" for n in range(outside)),
        ]
    ]


@pytest.mark.parametrize("members", range(1, 7))
@pytest.mark.parametrize(("layers", "kinds", "outside"), [(1, 1, 0), (2, 1, 0), (3, 3, 0), (4, 2, 1), (5, 3, 1)])
def test_a_single_culprit_is_found_at_every_place_within_the_bound(
    members: int, layers: int, kinds: int, outside: int
) -> None:
    parts = stack(members, layers, kinds, outside)
    modules = layers * kinds + outside
    for planted in parts:
        told = Told(lambda off, planted=planted: planted not in off)
        found = find(parts, told)
        assert found.parts == (planted,)
        assert found.evaluations <= math.ceil(math.log2(modules)) + members
        assert len(told.asked) == len(set(told.asked)) <= found.evaluations + 3, "the stack, its base, and the proof"


def test_unlike_members_are_within_the_bound() -> None:
    parts = [
        *stack(1, 7, 3),
        StackPart(1, "model.layers.0.mlp.down_proj"),
        *(StackPart(2, p.module) for p in stack(1, 5, 1)),
    ]
    for planted in parts:
        found = find_culprits(parts, lambda off, planted=planted: planted not in off)
        assert found.parts == (planted,) and found.evaluations <= math.ceil(math.log2(21)) + 3


def test_members_come_first_and_layers_before_modules() -> None:
    parts = stack(2, 4, 3)
    told = Told(lambda off: parts[-1] not in off)
    find(parts, told)
    assert told.asked[:2] == [frozenset(), frozenset(parts)]
    assert told.asked[2:4] == [{part for part in parts if part.member == n} for n in (0, 1)]
    assert told.asked[4] == {part for part in parts if part.member == 1 and part.module < "model.layers.2"}


def test_accidents_do_not_hide_a_single_culprit() -> None:
    """Nonsense changes with every part: that it turns good without some says little, that it stays bad much."""
    parts, right = stack(3, 4, 3), 0
    for planted in parts:
        for seed in range(10):
            dice, told = random.Random(seed), dict[Off, bool]()

            def is_bad(off: Off, planted: StackPart = planted, told: dict[Off, bool] = told, dice: Any = dice) -> bool:
                accident = len(off) > 1 and dice.random() < 0.3
                return told.setdefault(off, planted not in off and not accident)

            right += find_culprits(parts, is_bad).parts == (planted,)
    assert right >= 0.9 * 10 * len(parts)


def test_a_stack_that_is_not_bad_has_no_culprit() -> None:
    assert find_culprits(stack(2, 2, 2), lambda off: False) == Found((), 2)
    assert find_culprits(stack(1, 2, 2), lambda off: True) == Found((), 0), "nor one whose base is bad"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_several_culprits_are_all_found(count: int) -> None:
    parts = stack(3, 4, 3)
    for planted in itertools.islice(itertools.combinations(parts, count), 0, None, 97):
        found = find_culprits(parts, lambda off, planted=planted: not set(planted) <= off)
        assert set(found.parts) == set(planted)


def test_parts_that_are_only_bad_together_are_told_by_one_of_them() -> None:
    parts = stack(2, 3, 3)
    for pair in itertools.combinations(parts, 2):
        found = find_culprits(parts, lambda off, pair=pair: not set(pair) & off)
        assert len(found.parts) == 1 and set(found.parts) < set(pair)


def test_what_is_spread_is_told_by_what_it_stands_in() -> None:
    parts = stack(3, 8, 3)
    spread = {part for part in parts if part.member == 1}
    found = find_culprits(parts, lambda off: len(spread - off) > 2)
    assert set(found.parts) == spread, "a whole member"
    layers = {part for part in spread if part.layer in ("model.layers.2", "model.layers.5", "model.layers.6")}
    found = find_culprits(parts, lambda off: bool(layers - off))
    assert set(found.parts) == layers, "nine modules, told by their layers"


def test_what_is_returned_is_good_whatever_the_stack_is() -> None:
    parts, dice = stack(3, 3, 2), random.Random(0)
    for _ in range(300):
        answers = {frozenset(): True, frozenset(parts): False}

        def is_bad(off: Off, answers: dict[Off, bool] = answers) -> bool:
            return answers.setdefault(off, dice.random() < 0.5)

        found = find_culprits(parts, is_bad)
        assert found.parts and answers[frozenset(found.parts)] is False
