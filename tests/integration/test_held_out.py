"""Held-out records during a run: what is found, which weights are kept, when it stops; nothing is disturbed."""

from __future__ import annotations

import math
import os
import shutil
import signal
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file
from tiny_registry import CHAT, TEXTS, interrupt

from stackctl.engine.evaluation import scoring
from stackctl.engine.loss.row_layout import choose_layout
from stackctl.engine.training import run

# A rate at which a tiny random model soon learns its data by heart, and forgets how to read others.
GREEDY = ("--epochs", 10, "--batch-size", 2, "--learning-rate", 0.1, "--dropout", 0.3, "--max-steps", 20)


def held_out(h: Any) -> list[Any]:
    return ["--eval-data", h.data(TEXTS, "held-out.jsonl")]


def weights(h: Any, name: str) -> dict[str, torch.Tensor]:
    return load_file(h.weights(name) / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def looks(h: Any, name: str) -> dict[int, float]:
    return {point["step"]: point["eval_loss"] for point in h.log(name) if "eval_loss" in point}


def run_of(h: Any, name: str) -> dict[str, Any]:
    return h.run("inspect", name, "--json").json["run"]


def test_looking_disturbs_nothing(h: Any) -> None:
    h.add("style", seed=1, lora_dropout=0.5)
    plain = h.train("plain", *GREEDY, on="style")
    watched = h.train("watched", *GREEDY, *held_out(h), "--eval-steps", 3, "--keep", "last", on="style")
    assert same(weights(h, "plain"), weights(h, "watched"))
    assert list(looks(h, "watched")) == [0, 3, 6, 9, 12, 15, 18, 20]
    assert [p for p in h.log("watched") if "loss" in p] == h.log("plain")
    for key in ("steps", "tokens", "supervised_tokens", "loss"):
        assert plain[key] == watched[key]


def test_what_is_found_is_the_loss_of_the_weights_and_the_best_are_kept(h: Any) -> None:
    style = h.add("style", seed=1)
    found = h.train("best", *GREEDY, *held_out(h), "--eval-steps", 1, on="style")
    losses = looks(h, "best")
    assert list(losses) == list(range(21))
    best = min(range(1, 21), key=lambda step: losses[step])
    assert best not in (1, 20), "otherwise this test shows nothing"
    assert (found["kept_step"], found["eval_loss"], found["eval_loss_before"]) == (best, losses[best], losses[0])
    assert oracle.loss(oracle.live(h.base, (style, 1)), TEXTS) == pytest.approx(losses[0], rel=1e-5)
    assert oracle.loss(oracle.live(h.base, (style, 1), (h.weights("best"), 1)), TEXTS) == pytest.approx(
        losses[best], rel=1e-5
    )
    short = [*GREEDY[:-1], best]
    h.train("short", *short, *held_out(h), "--eval-steps", best, "--scheduler", "constant", on="style")
    assert same(weights(h, "best"), weights(h, "short")), "a run that ends there ends with these weights"
    known = run_of(h, "best")
    assert {key: known[key] for key in ("kept_step", "eval_loss", "eval_loss_before", "steps")} == {
        "kept_step": best, "eval_loss": losses[best], "eval_loss_before": losses[0], "steps": 20,
    }  # fmt: skip
    last = h.train("last", *GREEDY, *held_out(h), "--eval-steps", 1, "--keep", "last", on="style")
    assert (last["kept_step"], last["eval_loss"]) == (20, losses[20])


def test_held_out_records_share_rows_and_count_as_the_longest(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that only they exceed has to be felt before training."""
    longest: list[int] = []
    rows: list[int] = []

    def watch_layout(*arguments: Any, **options: Any) -> Any:
        longest.append(options["longest"])
        return choose_layout(*arguments, **options)

    def watch_rows(*arguments: Any, **options: Any) -> Any:
        found = rows_of(*arguments, **options)
        rows.append(len(found))
        return found

    rows_of = scoring.rows_of
    monkeypatch.setattr(run, "choose_layout", watch_layout)
    monkeypatch.setattr(scoring, "rows_of", watch_rows)
    texts = [{"text": TEXTS[0]["text"] * times} for times in (1, 2, 3)]
    found = h.train("new", "--max-steps", 1, "--eval-data", h.data(texts, "held-out.jsonl"), records=TEXTS[:1])
    assert rows == [1, 1], "before the first step and after the last one"
    assert longest[0] > 2 * found["tokens"]
    assert oracle.loss(oracle.live(h.base), texts) == pytest.approx(found["eval_loss_before"], rel=1e-5)


def test_the_curve_is_seen(h: Any) -> None:
    h.train("style", *GREEDY, *held_out(h), "--eval-steps", 10)
    curve = h.run("inspect", "style", "--curve", "--json").json["curves"]["style@1"]
    log = h.log("style")
    assert curve["loss"] == [[p["step"], p["loss"]] for p in log if "loss" in p]
    assert curve["eval_loss"] == [[p["step"], p["eval_loss"]] for p in log if "eval_loss" in p]
    shown = h.run("inspect", "style").out.splitlines()
    assert all(len(line) <= 80 for line in shown if "┤" in line or "held-out" in line)
    assert sum("┤" in line for line in shown) == 6
    assert sum("┤" in line for line in h.run("inspect", "style:0.5", "--curve").out.splitlines()) == 12
    assert f"-> {log[-1]['eval_loss']:.3f}" in shown[-1]
    picture = (h.weights("style") / "training_loss.svg").read_text()
    assert picture.startswith("<svg") and picture.count("<polyline") == 2 and "style@1 held-out" in picture
    h.add("made", seed=1)
    assert "no losses were recorded" in h.run("inspect", "made", "--curve").out


def test_ten_looks_unless_told_otherwise(h: Any) -> None:
    h.train("ten", *GREEDY, *held_out(h))
    assert list(looks(h, "ten")) == list(range(0, 21, 2))
    h.train("few", *GREEDY[:-1], 3, *held_out(h))
    assert list(looks(h, "few")) == [0, 1, 2, 3]


def test_it_stops_when_nothing_better_comes(h: Any) -> None:
    whole = h.train("whole", *GREEDY, *held_out(h), "--eval-steps", 1)
    losses = looks(h, "whole")
    for patience in (1, 3):
        best, wanted = 0, None
        for step in range(1, 21):
            best = step if not best or losses[step] < losses[best] else best
            if wanted is None and step - best >= patience:
                wanted, kept = step, best
        assert wanted is not None and wanted < 20
        name = f"early-{patience}"
        found = h.train(name, *GREEDY, *held_out(h), "--eval-steps", 1, "--patience", patience)
        assert (found["steps"], found["kept_step"], found["stopped_early"]) == (wanted, kept, True)
        assert looks(h, name) == {step: loss for step, loss in losses.items() if step <= wanted}
    assert not whole["stopped_early"]


def test_a_resumed_run_knows_what_was_best(h: Any) -> None:
    """The best weights came before the save; a second kill comes after a look that the save does not know of."""
    h.add("style", seed=1)
    options = (*GREEDY, "--learning-rate", 0.15, "--eval-steps", 1, "--save-steps", 6, "--frozen", "live")
    whole = h.train("whole", *options, *held_out(h), on="style")
    assert whole["kept_step"] <= 12, "otherwise this test shows nothing"

    def interrupt() -> None:
        raise KeyboardInterrupt

    for step in (9, 14, 17):
        h.at_step(step, interrupt)
        h.train("new", *options, *held_out(h), "--resume", on="style", code=130)
    h.at_step(0, interrupt)
    h.data(CHAT, "held-out.jsonl")
    other = h.train("new", *options, "--eval-data", "held-out.jsonl", "--resume", on="style", code=2)
    assert "held-out data" in other["error"]["message"]
    found = h.train("new", *options, *held_out(h), "--resume", on="style")
    keys = ("steps", "tokens", "loss", "kept_step", "eval_loss", "eval_loss_before", "digest")
    assert {key: found[key] for key in keys} == {key: whole[key] for key in keys}
    assert h.log("new") == h.log("whole")
    assert same(weights(h, "new"), weights(h, "whole"))


def test_a_run_that_stopped_early_and_was_killed_trains_no_further(h: Any) -> None:
    options = (*GREEDY, *held_out(h), "--eval-steps", 1, "--save-steps", 1, "--patience", 2)
    whole = h.train("whole", *options)
    assert whole["stopped_early"]
    h.at_step(whole["steps"], lambda: os.kill(os.getpid(), signal.SIGINT))
    h.train("new", *options, code=130)
    h.at_step(0, lambda: None)
    steps: list[int] = []
    for step in range(1, 21):
        h.at_step(step, lambda step=step: steps.append(step))
    found = h.train("new", *options, "--resume")
    assert not steps
    assert (found["digest"], found["steps"], found["kept_step"]) == (
        whole["digest"], whole["steps"], whole["kept_step"],
    )  # fmt: skip


def test_a_run_that_broke_and_was_killed_goes_back_to_the_best(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that were saved after the broken look are not gone on from."""
    looked = list[float]()

    def loss(*_: Any, **__: Any) -> dict[str, float]:
        looked.append(1.0)
        return {"eval_loss": math.nan if len(looked) == 4 else 5.0 - len(looked)}

    monkeypatch.setattr(run, "held_out_loss", loss)
    options = (*GREEDY, *held_out(h), "--eval-steps", 1, "--save-steps", 1)
    whole = h.train("whole", *options)
    assert (whole["kept_step"], whole["steps"]) == (2, 3)
    looked.clear()
    with monkeypatch.context() as killed:
        killed.setattr(run, "register_version", lambda *_, **__: interrupt())
        h.train("new", *options, code=130)
    assert [run["step"] for run in h.run("ls", "--json").json["runs"]] == [3]
    found = h.train("new", *options, "--resume")
    assert found["digest"] == whole["digest"]
    assert "the loss of step 3 is not a finite number" in found["problems"][0]["message"]
    assert len(looked) == 4


def test_held_out_records_have_to_be_there(h: Any) -> None:
    for option in ("--eval-steps", "--patience"):
        error = h.train("new", option, 2, code=2)["error"]
        assert option in error["message"]
        assert "--eval-data" in error["hint"]


def test_a_recipe_is_out_of_date_when_records_are_others_that_decide(h: Any) -> None:
    data = h.data()
    h.data(TEXTS, "held-out.jsonl")

    def why(**job: Any) -> str | None:
        keys = ", ".join(f"{key}: {value}" for key, value in job.items())
        (h.folder / "stackctl.yaml").write_text(
            f"base: tiny\ntrain:\n  a: {{data: {data.name}, rank: 2, max_steps: 2, warmup: 0, {keys}}}\n"
        )
        return h.run("train", "--dry-run", "--json").json["plan"][0]["why"]

    assert why(eval_data="held-out.jsonl") == "not trained yet"
    h.run("train", "-q")
    assert why(eval_data="held-out.jsonl") is None
    shutil.copy(h.folder / "held-out.jsonl", h.folder / "same.jsonl")
    assert why(eval_data="same.jsonl") is None
    h.data(TEXTS[1:], "held-out.jsonl")
    assert why(eval_data="held-out.jsonl") == "other held-out data"
    assert why(eval_data="same.jsonl", keep="last") == "other keep"
    assert why() == "other held-out data"
    assert why(eval_data="same.jsonl", patience=3) == "other patience"
