"""A run that was stopped or killed goes on to the weights, the curve and the numbers of an uninterrupted one."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stress.trainings import ANY_MOMENT, PLACES, kill_and_resume, make_template
from tiny_registry import CHAT, interrupt

from stackctl.registry.run_folders import run_folder

WHOLE_RUN = ("steps", "tokens", "supervised_tokens", "loss", "trainable_parameters", "digest")
SHAPE = ("--epochs", 4, "--batch-size", 2, "--scheduler", "cosine", "--warmup", 0.2, "--dropout", 0.3)
LIVELY = (*SHAPE, "--save-steps", 2)


def same_run(h: Any, resumed: Any, whole: Any, name: str = "new") -> None:
    """The weights, the curve and the numbers of a resumed run are the uninterrupted one's, to the last bit."""
    assert {key: resumed[key] for key in WHOLE_RUN} == {key: whole[key] for key in WHOLE_RUN}
    found, wanted = (load_file(h.weights(n) / "adapter_model.safetensors") for n in (name, "whole"))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert h.log(name) == h.log("whole")


@pytest.mark.parametrize("frozen", ["fold", "live"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_resumed_run_is_the_uninterrupted_one(tiny_registry: Any, name: str, frozen: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1)
    style = h.bytes_of("style")
    options = ("--frozen", frozen, *LIVELY)
    whole = h.train("whole", *options, on="style")
    assert whole["steps"] == 12
    h.at_step(3, interrupt)
    h.train("new", *options, on="style", code=130)
    assert h.adapters() == {"style", "whole"}
    runs = h.run("ls", "--json").json["runs"]
    assert [(run["name"], run["step"]) for run in runs] == [("new", 2)]
    h.train("new", *options, "--resume", "--seed", 7, on="style", code=2)
    h.train("new", *options, "--resume", "--learning-rate", 0.1, on="style", code=2)
    h.train("new", *options, "--resume", on="style:0.5", code=2)
    h.train("new", *options, "--resume", on="style", records=CHAT[:4], code=2)
    h.at_step(0, interrupt)
    same_run(h, h.train("new", *options, "--resume", on="style"), whole)
    assert h.bytes_of("style") == style
    assert h.run("ls", "--json").json["runs"] == []


@pytest.mark.parametrize("at", [5, 12])
def test_ctrl_c_saves_the_step_it_came_in(h: Any, at: int) -> None:
    h.add("style", seed=1)
    whole = h.train("whole", *SHAPE, on="style")
    h.at_step(at, lambda: os.kill(os.getpid(), signal.SIGINT))
    error = h.train("new", *SHAPE, on="style", code=130)
    assert error["error"]["code"] == "interrupted"
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [at]
    h.at_step(0, interrupt)
    same_run(h, h.train("new", *SHAPE, "--resume", on="style"), whole)


@pytest.mark.parametrize("length", [("--epochs", 2.5), ("--max-steps", 7)])
def test_a_run_that_ended_in_mid_epoch_takes_no_step_more(h: Any, length: tuple[object, ...]) -> None:
    """Trainer would: it looks whether it is done after a step, and an epoch has more of them."""
    options = (*SHAPE, *length)
    whole = h.train("whole", *options)
    assert whole["steps"] % 3, "an epoch has three"
    h.at_step(whole["steps"], lambda: os.kill(os.getpid(), signal.SIGTERM))
    h.train("new", *options, code=143)
    h.at_step(0, interrupt)
    same_run(h, h.train("new", *options, "--resume"), whole)


def test_resuming_twice_and_with_nothing_saved(h: Any) -> None:
    h.add("style", seed=1)
    whole = h.train("whole", *LIVELY, on="style")
    h.at_step(1, interrupt)
    h.train("new", *LIVELY, "--resume", on="style", code=130)
    assert [run["saves"] for run in h.run("ls", "--json").json["runs"]] == [0]
    h.at_step(5, interrupt)
    h.train("new", *LIVELY, "--resume", on="style", code=130)
    h.at_step(9, interrupt)
    h.train("new", *LIVELY, "--resume", on="style", code=130)
    h.at_step(0, interrupt)
    same_run(h, h.train("new", *LIVELY, "--resume", on="style"), whole)


def test_a_run_that_was_cut_off_after_it_was_registered_is_not_registered_twice(
    h: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = shutil.rmtree

    def cut_off(path: Any, **options: Any) -> None:
        if path == run_folder(h.registry, "new").path:
            monkeypatch.setattr(shutil, "rmtree", remove)
            interrupt()
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    h.train("new", *LIVELY, code=130)
    assert h.adapters() == {"new"}
    resumed = h.train("new", *LIVELY, "--resume")
    assert (resumed["version"], resumed["steps"]) == (1, 12)
    assert h.run("ls", "--json").json["runs"] == []
    assert h.train("new", *LIVELY)["version"] == 2, "a training that is no resumed one is another version"


def test_a_kill_leaves_nothing_half_done(models: Any, tmp_path: Path) -> None:
    """SIGKILL in a save, while registering and at any moment. ``make stress`` does it for longer."""
    template = tmp_path / "template"
    whole = make_template(template, models("llama"))
    moments = [*PLACES, ANY_MOMENT]
    kills, wrong = kill_and_resume(template, tmp_path / "place", whole, moments, random.Random(0))
    assert not wrong
    assert kills.keys() >= PLACES.keys()
