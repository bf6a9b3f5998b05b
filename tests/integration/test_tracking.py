"""``--report-to``: what reaches the tracker, where it lies, and that stdout stays the result's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny_registry import TEXTS


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_losses_of_the_log(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eval_data = h.data(TEXTS, "held-out.jsonl")
    ran = h.run(
        "train", "style", "--data", h.data(), "--rank", 2, "--max-steps", 4, "--eval-data", eval_data, "--eval-steps",
        2, "--report-to", "tensorboard", "--json",
    )  # fmt: skip
    assert ran.json["adapter"] == "style", "stdout is one document"
    folder = h.folder / "registry" / "logs" / "style" / "1"
    assert str(folder) in ran.err
    found, log = scalars(folder), h.log("style")
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss")):
        wanted = {p["step"]: p[key] for p in log if key in p}
        assert dict(found[tag]) == {step: pytest.approx(value, rel=1e-4) for step, value in wanted.items()}
    elsewhere = h.folder / "elsewhere"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(elsewhere))
    ran = h.run(
        "train", "style", "--data", h.data(), "--rank", 2, "--max-steps", 1, "--report-to", "tensorboard", "-q"
    )  # fmt: skip
    assert ran.out == "style@2\n"
    assert len(scalars(elsewhere)["train/loss"]) == 1
    assert not (folder.parent / "2").exists()


def test_what_is_not_installed_is_said_before_anything_is_loaded(
    h: Any, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("wandb", "trackio") else real(name, *rest)
    )
    monkeypatch.setattr("stackctl.engine.training.run.load_base", lambda *_: pytest.fail("the base was loaded"))
    said = fails("train", "style", "--data", h.data(), "--report-to", "wandb,trackio", code=4)
    assert "pip install wandb" in said and "pip install trackio" in said
    (h.folder / "stackctl.yaml").write_text("base: tiny\ntrain:\n  a: {data: data.jsonl, report_to: [wandb]}\n")
    assert "pip install wandb" in fails("train", code=4)


def test_a_tracker_that_nobody_knows_is_2(h: Any, fails: Any) -> None:
    assert "'tensorboard'" in fails("train", "style", "--data", h.data(), "--report-to", "tensorbord", code=2)
