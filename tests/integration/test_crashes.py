"""A kill at any moment leaves the registry valid, and the rerun goes on. ``make stress`` does this for longer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from stress.kills import FROM_HUB, LIGHT, Scenario, count_steps, hub_with, kill_and_look, make_template
from stress.writers import make_shared, work_together

SAMPLE, SAMPLE_FROM_HUB = 6, 2


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("crashes") / "template"
    make_template(folder)
    with hub_with(folder):
        yield folder


@pytest.mark.parametrize("scenario", LIGHT + FROM_HUB, ids=lambda scenario: scenario.name)
def test_a_killed_command_leaves_nothing_half_done(template: Path, tmp_path: Path, scenario: Scenario) -> None:
    steps = count_steps(template, tmp_path, scenario)
    assert steps > 3
    sample = SAMPLE_FROM_HUB if scenario in FROM_HUB else min(SAMPLE, steps)
    for step in random.Random(scenario.name).sample(range(1, steps + 1), sample):
        was_killed, wrong = kill_and_look(template, tmp_path / "place", scenario, step)
        assert was_killed
        assert not wrong


def test_several_who_write_at_once_lose_nothing(tmp_path: Path) -> None:
    root = make_shared(tmp_path / "shared")
    with hub_with(tmp_path / "shared"):
        added, wrong = work_together(root, tmp_path / "round", "seed", workers=3, commands=5)
    assert added > 3
    assert not wrong
