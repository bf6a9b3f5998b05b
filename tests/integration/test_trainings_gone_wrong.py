"""A training that went wrong says so: when it ends, in its entry, and wherever it is looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_registry import made_once

WORDS = ("the sea", "and the wind", "over old stones", "where gulls cry", "at dawn", "goes the tide")


@pytest.fixture
def learned(run: Callable[..., Any], registry: Path, models: Any, tmp_path: Path) -> Path:
    """A registry whose adapter ``good`` was trained well below a guess; texts lie beside it."""
    texts = [" ".join(WORDS[(i * k) % 6] for k in range(1, 5)) for i in range(32)]

    def make() -> None:
        (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        run("train", "good", "--base", "tiny", "--data", "text.jsonl", *_run(40, 1e-2), "-q")

    made_once(tmp_path, models("llama").with_name("learned-registry"), make)
    return registry


def _run(steps: int, rate: float) -> list[object]:
    return ["--rank", 4, "--max-steps", steps, "--batch-size", 4, "--learning-rate", rate]


def test_an_absurd_rate_is_told(run: Callable[..., Any], learned: Path, tmp_path: Path) -> None:
    ran = run("train", "boom", "--on", "good", "--data", "text.jsonl", *_run(6, 1), "--json")
    (problem,) = ran.json["problems"]
    assert problem["code"] in ("loss_rose", "uniform_guess")
    assert problem["severity"] == "warning"
    assert problem["member"] == "boom@1"
    assert "--learning-rate 0.0002 (it was 1)" in problem["hint"]
    entry = yaml.safe_load((learned / "adapters" / "boom.yaml").read_text())
    (kept,) = entry["versions"][0]["problems"]
    assert kept["code"] == problem["code"]
    assert kept["message"] in problem["message"]
    for what in ("boom", "good+boom"):
        assert [p["code"] for p in run("inspect", what, "--json").json["problems"] if p["code"] == problem["code"]]
    run("inspect", "boom", "--output", "boom.html")
    page = (tmp_path / "boom.html").read_text()
    assert "the loss went from" in page
    assert "--learning-rate 0.0002" in page
    told = run("train", "boom", "--on", "good", "--data", "text.jsonl", *_run(6, 1))
    assert "warning: the loss went from" in told.err
    assert "hint: first of all lower the rate" in told.err
    assert "next:" not in told.out


def test_a_run_that_went_well_has_no_problems(run: Callable[..., Any], learned: Path) -> None:
    assert run("inspect", "good", "--json").json["problems"] == []
    ran = run("train", "more", "--on", "good", "--data", "text.jsonl", *_run(5, 1e-4), "--json")
    assert ran.json["problems"] == []
    assert "problems" not in (learned / "adapters" / "more.yaml").read_text()


def test_a_random_model_that_begins_at_a_guess_raises_no_alarm(
    run: Callable[..., Any], registry: Path, tmp_path: Path
) -> None:
    (tmp_path / "bytes.jsonl").write_text(
        "".join(json.dumps({"text": "".join(chr(33 + (7 * i * k) % 90) for k in range(40))}) + "\n" for i in range(8))
    )
    ran = run("train", "x", "--base", "tiny", "--data", "bytes.jsonl", *_run(4, 1e-5), "--json")
    assert abs(ran.json["loss"] - math.log(260)) < 0.6
    assert ran.json["problems"] == []


def test_without_held_out_records_a_loss_that_is_no_number_registers_nothing(
    run: Callable[..., Any], learned: Path
) -> None:
    ran = run("train", "boom", "--on", "good", "--data", "text.jsonl", *_run(20, 500), code=1)
    assert "is not a finite number" in ran.err
    assert "--learning-rate" in ran.err
    ran = run("train", "boom", "--on", "good:1e5", "--data", "text.jsonl", *_run(1, 1e-3), code=1)
    assert "after the last step" in ran.err
    assert "holds values that are not finite numbers" in ran.err
    assert not (learned / "adapters" / "boom.yaml").exists()


def test_with_held_out_records_the_best_weights_before_it_are_kept(run: Callable[..., Any], learned: Path) -> None:
    held_out = ["--eval-data", "text.jsonl", "--eval-steps", 1]
    ran = run("train", "boom", "--on", "good", "--data", "text.jsonl", *_run(20, 500), *held_out, "--json")
    assert ran.json["steps"] < 20
    assert ran.json["kept_step"] <= ran.json["steps"]
    assert math.isfinite(ran.json["loss"])
    (problem,) = ran.json["problems"]
    assert problem["code"] == "loss_not_finite"
    assert f"the weights of step {ran.json['kept_step']}" in problem["message"]
    assert run("verify", "--json").json["problems"] == []
    measured = run("eval", "good+boom", "--data", "text.jsonl", "--json").json["results"][0]["loss"]
    assert measured == pytest.approx(ran.json["eval_loss"], abs=1e-4)


def test_the_last_weights_of_a_broken_run_are_not_registered(run: Callable[..., Any], learned: Path) -> None:
    held_out = ["--eval-data", "text.jsonl", "--eval-steps", 1, "--keep", "last"]
    run("train", "boom", "--on", "good", "--data", "text.jsonl", *_run(20, 500), *held_out, code=1)
    assert not (learned / "adapters" / "boom.yaml").exists()
