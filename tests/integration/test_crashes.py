"""A kill at any moment leaves the registry valid, and the rerun goes on. ``make stress`` does this for longer."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from stress.kills import LIGHT, Scenario, count_steps, kill_and_look, make_template

SAMPLE = 6


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written outlives a killed process, flushed or not; flushing is counted all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crashes") / "template"
    make_template(folder)
    return folder


@pytest.mark.parametrize("scenario", LIGHT, ids=lambda scenario: scenario.name)
def test_a_killed_command_leaves_nothing_half_done(template: Path, tmp_path: Path, scenario: Scenario) -> None:
    steps = count_steps(template, tmp_path, scenario)
    assert steps > 3
    for step in random.Random(scenario.name).sample(range(1, steps + 1), min(SAMPLE, steps)):
        was_killed, wrong = kill_and_look(template, tmp_path / "place", scenario, step)
        assert was_killed
        assert not wrong
