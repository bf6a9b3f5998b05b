"""Mapped weights are copied when steps become quicker by more than it takes, and not otherwise."""

from __future__ import annotations

import pytest

from stackctl.engine.generation import mapped_weights
from stackctl.engine.generation.mapped_weights import MappedWeights
from stackctl.machine.resources import Memory

SIZES = [8 << 20, 0, 8 << 20, 8 << 20, 8 << 20, 40 << 20]
COPYING = 0.010
"""Seconds for a layer."""


class Machine:
    """Parts whose steps take so many seconds, mapped and copied; every call of the clock is told the time so far."""

    def __init__(self, mapped: float, copied: float, sizes: list[int] = SIZES) -> None:
        self.time, self.mapped, self.copied = 0.0, mapped, copied
        self.first, self.sizes = list(sizes), list(sizes)
        self.made: list[int] = []

    def copy(self, number: int) -> None:
        self.time += COPYING * self.sizes[number] / (8 << 20)
        self.sizes[number] = 0
        self.made.append(number)

    def step(self, weights: MappedWeights, to_come: int, rows: int = 1) -> bool:
        changed = weights.prepare(rows, to_come)
        weights.begin()
        for number, size in enumerate(self.first):
            per_byte = self.mapped if self.sizes[number] else self.copied
            self.time += rows * per_byte * size / (8 << 20)
            weights.passed()
        return changed


def steps(machine: Machine, to_come: int) -> list[int]:
    """Before which steps something was copied."""
    weights = MappedWeights(machine, lambda: machine.time)
    return [number for number in range(30) if machine.step(weights, to_come - number)]


def test_all_is_copied_where_it_pays_and_a_few_layers_before() -> None:
    machine = Machine(mapped=0.002, copied=0.001)
    assert steps(machine, 80) == [5, 10]
    assert machine.made == [0, 2, 3, 4, 5] and not any(machine.sizes)


@pytest.mark.parametrize(
    ("machine", "to_come", "tried"),
    [
        (Machine(mapped=0.001, copied=0.001), 10_000, [0, 2, 3]),
        (Machine(mapped=0.001, copied=0.002), 10_000, [0, 2, 3]),
        (Machine(mapped=0.002, copied=0.001), 20, [0, 2, 3]),
        (Machine(mapped=0.002, copied=0.001, sizes=[4096] * 6), 10_000, []),
        (Machine(mapped=0.002, copied=0.001, sizes=[0] * 6), 10_000, []),
    ],
    ids=["as quick", "slower", "too few tokens to come", "small", "not mapped"],
)
def test_what_does_not_pay_stays_mapped(machine: Machine, to_come: int, tried: list[int]) -> None:
    assert steps(machine, to_come) == ([5] if tried else [])
    assert machine.made == tried


def test_a_head_alone_is_tried_by_itself() -> None:
    machine = Machine(mapped=0.002, copied=0.001, sizes=[0, 0, 0, 40 << 20])
    assert steps(machine, 80) == [5]
    assert machine.made == [3]


def test_steps_of_unlike_rows_are_not_compared() -> None:
    machine = Machine(mapped=0.001, copied=0.001)
    weights = MappedWeights(machine, lambda: machine.time)
    counts = [9, 9, 9, 9, 9, 9, 8, 8, 8, 8, 8, 8, *[7] * 20]
    assert [number for number, rows in enumerate(counts) if machine.step(weights, 1000, rows)] == [5, 11]
    assert machine.made == [0, 2, 3, 4, 5], "others are tried each time, and nothing was won"


def test_no_more_than_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_weights, "main_memory", lambda: Memory(1 << 30, 4 * sum(SIZES) - 1))
    machine = Machine(mapped=0.002, copied=0.001)
    assert steps(machine, 10_000) == [] and machine.made == []
