"""A disk that is full, read-only, broken or not ours leaves nothing half-done. ``make stress`` tries every step."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from stress.kills import Scenario, count_steps, make_template
from stress.refusals import ERRORS, SCENARIOS, refuse_and_look


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refusals") / "template"
    make_template(folder)
    return folder


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_refused_command_leaves_nothing_half_done(template: Path, tmp_path: Path, scenario: Scenario) -> None:
    steps = range(1, count_steps(template, tmp_path, scenario) + 1)
    chance = random.Random(scenario.name)
    refused, wrong = refuse_and_look(template, tmp_path / "place", scenario, ERRORS["full"], 1)
    assert refused and not wrong
    for kind, after in zip(ERRORS, chance.choices(steps, k=len(ERRORS)), strict=True):
        assert not refuse_and_look(template, tmp_path / "place", scenario, ERRORS[kind], after)[1]
