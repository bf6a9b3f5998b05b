"""Training in two processes on a CPU: the numbers of one process, one version, and an end in peace."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from oracle import distance, factors_of
from tiny_registry import CHAT, TEXTS

from stackctl.jobs import ranks

# 197 records in steps of four: the last step of an epoch is short, and one of the two processes has nothing to do.
RECORDS = [CHAT[i % len(CHAT)] for i in range(197)]
COMMON = ("--dtype", "float32", "--epochs", 2, "--learning-rate", 0.001, "--scheduler", "cosine")
STEPS, EPOCH = 100, 50
ONE = (*COMMON, "--batch-size", 4, "--gradient-accumulation", 1)
TWO = (*COMMON, "--batch-size", 2, "--num-processes", 2)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


_MEDDLING = """
import os, pathlib, time
_rank, _mkdir = os.environ.get("RANK"), os.mkdir

def mkdir(path, *more, **options):
    if _rank == "0" and pathlib.Path(path).name.startswith("checkpoint-"):
        time.sleep({delay})
    _mkdir(path, *more, **options)

def makedirs(path, *more, **options):
    if _rank == "1" and {error} and pathlib.Path(path).name == "checkpoint-4":
        raise OSError({error}, os.strerror({error}), str(path))
    _makedirs(path, *more, **options)

_makedirs, os.mkdir, os.makedirs = os.makedirs, mkdir, makedirs
"""
"""What a process does before anything else: rank 0 makes a save's folder late, rank 1 may not write into the second."""


def meddle(h: Any, monkeypatch: pytest.MonkeyPatch, *, delay: float = 0, error: int = 0) -> None:
    folder = h.folder / "meddling"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(_MEDDLING.format(delay=delay, error=error))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.usefixtures("forked_ranks")
@pytest.mark.parametrize(("number", "room"), [(errno.ENOSPC, True), (errno.EACCES, False)])
def test_a_save_that_one_process_cannot_write_ends_both(
    h: Any, monkeypatch: pytest.MonkeyPatch, number: int, room: bool
) -> None:
    """Both say the true reason, nothing is left of it, and the save before it is what --resume goes on from."""
    options = (*TWO, "--save-steps", 2, "--max-steps", 6)
    meddle(h, monkeypatch, error=number)
    error = h.train("new", *options, code=1)["error"]
    assert "checkpoint-4 could not be written" in error["message"]
    assert os.strerror(number) in error["message"]
    assert ("free some space" in error["hint"]) is room
    assert "--resume" in error["hint"]
    [run] = h.run("ls", "--json").json["runs"]
    assert (run["step"], run["saves"]) == (2, 1)
    assert not (Path(run["path"]) / "checkpoint-4").exists()
    meddle(h, monkeypatch)
    assert h.train("new", *options, "--resume")["steps"] == 6


def test_two_processes_are_one_training(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted in the middle and resumed, two processes end with what one process makes of the same steps.

    The process that makes a save's folder is late, and the other has something to write into it.
    """
    meddle(h, monkeypatch, delay=0.3)
    h.add("style", seed=1)
    style = h.bytes_of("style")
    # Five records held out: one of the two processes reads one more than the other.
    watched = ("--eval-data", h.data(TEXTS, "held-out.jsonl"), "--eval-steps", 7)
    one = h.train("one", *ONE, *watched, on="style", records=RECORDS)
    assert one["steps"] == STEPS
    h.at_step(60, lambda: os.kill(os.getpid(), signal.SIGINT))
    error = h.train("two", *TWO, *watched, on="style", records=RECORDS, code=130)["error"]
    assert error["hint"].startswith("go on with: stackctl train --resume two --on style --data ")
    assert "--num-processes 2" in error["hint"]
    assert h.adapters() == {"style", "one"}
    [run] = h.run("ls", "--json").json["runs"]
    assert EPOCH < run["step"] < STEPS, "in the middle of the second epoch, whose order is not the first one's"
    other = h.train("two", *ONE, *watched, "--resume", on="style", records=RECORDS, code=2)["error"]["message"]
    assert "processes (2, now 1)" in other
    two = h.train("two", *TWO, *watched, "--resume", on="style", records=RECORDS)
    counted = ("kept_step", "steps", "tokens", "supervised_tokens", "trainable_parameters", "frozen", "on")
    assert {key: two[key] for key in counted} == {key: one[key] for key in counted}
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert distance(factors_of(h.weights("two")), factors_of(h.weights("one"))) < 1e-4
    for key in ("eval_loss", "eval_loss_before"):
        assert two[key] == pytest.approx(one[key], rel=1e-5)
    looks = [[p["step"] for p in h.log(name) if "eval_loss" in p] for name in ("one", "two")]
    assert looks[0] == looks[1] == [*range(0, STEPS, 7), STEPS]
    entry = h.run("inspect", "two", "--json").json
    assert entry["versions"] == [1], "registered once"
    assert entry["run"]["processes"] == 2
    assert h.bytes_of("style") == style
    assert h.run("verify", "--json").json["problems"] == []


def test_what_is_wrong_is_told_before_anything_is_launched(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was launched"))
    error = h.train("new", "--num-processes", 2, records=[{"text": "a"}, {"messages": "no"}], code=2)["error"]
    assert "line 2" in error["message"]
    config = h.folder / "accelerate.yaml"
    for text, part in (
        ("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 1}\n", "fsdp_version: 2"),
        ("distributed_type: DEEPSPEED\nnum_processes: 2\ndeepspeed_config: {zero_stage: 3}\n", "zero_stage: 2"),
        ("distributed_type: MULTI_GPU\nnum_processes: 16\nnum_machines: 2\n", "on each machine"),
        ("distributed_type: MULTI_GPU\nnum_processes: many\n", "line 2"),
        ("distributed_type: FSDP\nfsdp_config: [2]\n", "line 2"),
        ("a: b\n", "accelerate config"),
    ):
        config.write_text(text)
        error = h.train("new", "--accelerate-config", config, code=2)["error"]
        assert part in error["message"] + error["hint"]
    h.train("new", "--accelerate-config", "nowhere.yaml", code=3)
    assert h.adapters() == set()


def test_a_launcher_that_makes_one_process_of_two_is_found_out(h: Any) -> None:
    """The trap: accelerate starts a single process for a CPU configuration, and says nothing."""
    config = h.folder / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
    )
    error = h.train("new", "--accelerate-config", config, "--max-steps", 1, code=1)["error"]
    assert error["message"] == "accelerate started 1 process instead of 2"
    assert "MULTI_GPU" in error["hint"]
    assert h.adapters() == set()


# -- under somebody else's launcher, and when something dies ----------------------------------------------------------


def command(h: Any, name: str, *options: object) -> list[str]:
    return [str(part) for part in ("train", name, "--data", h.data(RECORDS), *COMMON, "--batch-size", 2, *options)]


def test_a_launched_process_does_not_launch_again(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was launched"))
    dry = h.run(*command(h, "new", "--num-processes", 2), "--dry-run", "--json").json
    assert dry["steps"] == STEPS
    error = h.run(*command(h, "new", "--num-processes", 3), "--json", code=2).json["error"]
    assert "--num-processes 3" in error["message"]
    assert ranks.world_size() == 2
