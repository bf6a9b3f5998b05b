"""Going on where a run ended: with any settings, after any end, and never from half a save."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_registry import CHAT, TEXTS, interrupt

from stackctl.registry import run_folders as runs
from stackctl.registry.run_folders import run_folder

SAVED = ("--save-steps", 2, "--dropout", 0.3, "--scheduler", "cosine", "--batch-size", 2)
KINDS = {
    "packed": ("--pack", "--max-length", 64, "--epochs", 4),
    "accumulated": ("--gradient-accumulation", 2, "--epochs", 4),
    "half an epoch more": ("--epochs", 2.5),
    "so many steps": ("--max-steps", 7, "--warmup", 0.3, "--weight-decay", 0.1),
    "a live stack": ("--frozen", "live", "--epochs", 3),
    "held-out records": ("--eval-data", "held-out.jsonl", "--eval-steps", 1, "--epochs", 3),
}


def weights(h: Any, name: str) -> str:
    digest: str = h.bytes_of(name)["adapter_model.safetensors"]
    return digest


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_settings_a_resumed_run_is_the_uninterrupted_one(h: Any, kind: str) -> None:
    h.add("style", seed=1)
    h.data(CHAT, "held-out.jsonl")
    records = TEXTS if kind == "packed" else CHAT
    options = (*SAVED, *KINDS[kind])
    h.train("whole", *options, on="style", records=records)
    h.at_step(3, interrupt)
    h.train("new", *options, on="style", records=records, code=130)
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [2]
    h.at_step(0, interrupt)
    h.train("new", *options, "--resume", on="style", records=records)
    assert weights(h, "new") == weights(h, "whole")
    assert h.log("new") == h.log("whole")


def half_written(save: Path) -> None:
    """As a kill leaves it: what was written first is there, what is written last is cut off."""
    (save / "optimizer.pt").write_bytes((save / "optimizer.pt").read_bytes()[:100])


def being_removed(save: Path) -> None:
    (save / "adapter_model.safetensors").unlink()


def without_its_last_word(save: Path) -> None:
    (save / "stackctl_save.json").unlink()


@pytest.mark.parametrize("damage", [half_written, being_removed, without_its_last_word])
def test_half_a_save_is_never_taken(h: Any, damage: Any) -> None:
    options = (*SAVED, "--epochs", 3)
    h.train("whole", *options)
    h.at_step(5, interrupt)
    h.train("new", *options, code=130)
    folder = run_folder(h.registry, "new")
    assert [save.name for save in folder.checkpoints] == ["checkpoint-2", "checkpoint-4"]
    damage(folder.path / "checkpoint-4")
    shutil.copytree(folder.path / "checkpoint-4", folder.path / "checkpoint-6")
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [2]
    h.at_step(0, interrupt)
    h.train("new", *options, "--resume")
    assert weights(h, "new") == weights(h, "whole")


def test_sigterm_saves_the_step_it_came_in_and_ends_with_143(h: Any) -> None:
    h.train("whole", *SAVED, "--epochs", 3)
    handler = signal.getsignal(signal.SIGTERM)
    h.at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    error = h.train("new", *SAVED, "--epochs", 3, code=143)["error"]
    assert error["code"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is handler
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [5]
    words = error["hint"].removeprefix("go on with: stackctl ").split()
    assert words[:3] == ["train", "--resume", "new"]
    h.at_step(0, interrupt)
    h.run(*words)
    assert weights(h, "new") == weights(h, "whole"), "the hint is the command that goes on"


def test_a_full_disk_keeps_the_save_before(h: Any) -> None:
    """The system refuses to write more of a file; torch, safetensors and Trainer each say it in words of their own."""
    options = (*SAVED, "--epochs", 3)
    h.train("whole", *options)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    h.at_step(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1])))
    try:
        ran = h.run("train", "new", "--data", h.data(), "--rank", 4, "--alpha", 8, "--warmup", 0,
                    "--learning-rate", 0.003, *options, "--json", code=None)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert ran.code == 1
    assert "checkpoint-4 could not be written" in ran.json["error"]["message"]
    assert "--resume" in ran.json["error"]["hint"]
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [2]
    h.at_step(0, interrupt)
    h.train("new", *options, "--resume")
    assert weights(h, "new") == weights(h, "whole")


def test_a_base_that_went_away_costs_nothing(tiny_registry: Any, tmp_path: Path, models: Any) -> None:
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    h = tiny_registry()
    h.run("base", "add", "moved", base)
    options = (*SAVED, "--epochs", 3, "--base", "moved")
    h.train("whole", *options)
    h.at_step(3, interrupt)
    h.train("new", *options, code=130)
    h.at_step(0, interrupt)
    base.rename(tmp_path / "elsewhere")
    h.train("new", *options, "--resume", code=3)
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [2]
    (tmp_path / "elsewhere").rename(base)
    h.train("new", *options, "--resume")
    assert weights(h, "new") == weights(h, "whole")


def test_a_base_that_was_added_again_with_another_template_is_another_run(
    tiny_registry: Any, tmp_path: Path, models: Any
) -> None:
    """Its weights are the same, and the tokens that are learned are others."""
    base = tmp_path / "base"
    shutil.copytree(models("llama"), base)
    h = tiny_registry()
    h.run("base", "add", "taught", base)
    options = (*SAVED, "--epochs", 3, "--base", "taught")
    h.at_step(3, interrupt)
    h.train("new", *options, code=130)
    h.at_step(0, interrupt)
    template, config = base / "chat_template.jinja", base / "tokenizer_config.json"
    for file, before, after, what in (
        (template, "{{ m['role'] }}", "{{ m['role'] | upper }}", "chat template"),
        (config, '"<|im_start|>"', '"a"', "tokenizer"),
    ):
        kept = file.read_text()
        file.write_text(kept.replace(before, after))
        h.run("base", "add", "taught", base)
        error = h.train("new", *options, "--resume", code=2)["error"]
        assert f"had other {what}" in error["message"]
        file.write_text(kept)
    h.run("base", "add", "taught", base)
    h.train("new", *options, "--resume")


def test_other_settings_are_named_with_what_they_were(h: Any) -> None:
    h.at_step(3, interrupt)
    h.train("new", *SAVED, "--epochs", 3, code=130)
    message = h.train("new", *SAVED, "--epochs", 4, "--seed", 5, "--resume", code=2)["error"]["message"]
    assert "epochs (3.0, now 4.0)" in message
    assert "seed (0, now 5)" in message


def test_two_runs_of_one_name_are_one_too_many(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "_HELD_TIMEOUT", 0.1)
    with run_folder(h.registry, "new").held():
        message = h.train("new", "--max-steps", 1, code=1)["error"]["message"]
    assert f"process {os.getpid()} on" in message
    h.train("new", "--max-steps", 1)
    assert h.adapters() == {"new"}
    assert h.run("ls", "--json").json["runs"] == []
