"""compose --sweep: losses over a grid of weights are those of eval, and nothing is written unless it was asked for."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from short_texts import texts

WEIGHTS = [0.0, 0.5, 1.0]


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(count)
    ]


@pytest.fixture
def style_and_noise(h: Any) -> Any:
    h.add("style", seed=1, scale=0.1)
    h.add("noise", seed=2, r=3, scale=0.1)
    return h


def loss(h: Any, expression: str, data: str) -> float:
    return float(h.run("eval", expression, "--data", data, "--json").json["results"][0]["loss"])


def test_each_loss_is_that_of_eval_and_nothing_is_written(style_and_noise: Any) -> None:
    data = style_and_noise.data(texts(0, 8))
    ask = ("--sweep", "style=0:1:0.5", "--data", data, "--json")
    made = style_and_noise.run("compose", "style+noise:0.5", *ask).json
    assert [row["weights"] for row in made["sweep"]] == [{"style": w, "noise": 0.5} for w in WEIGHTS]
    for row in made["sweep"]:
        assert row["data"] == str(data) and row["standard_error"] > 0
        assert row["loss"] == pytest.approx(
            loss(style_and_noise, f"style:{row['weights']['style']}+noise:0.5", data), abs=1e-5
        )
    assert made["best"] == min(made["sweep"], key=lambda row: row["loss"]) and made["best"]["p_value"] == 1
    assert made["stack"] is None and made["trade_off"] == [] and made["path"] is None
    assert style_and_noise.run("ls", "--json").json["stacks"] == []
    assert style_and_noise.run("compose", "style+noise:0.5", *ask[:-1], "-q").out.strip() == made["expression"]


def test_a_grid_over_two_data_sets(style_and_noise: Any) -> None:
    data = [style_and_noise.data(texts(0, 8), "a.jsonl"), style_and_noise.data(chats(7), "b.jsonl")]
    ask = ["--sweep", "noise=-1:1:0.8", "--sweep", "style@1=0:1:0.5", "--data", data[0], "--data", data[1]]
    page = style_and_noise.folder / "grid.html"
    made = style_and_noise.run("compose", "style+noise", *ask, "--name", "found", "--output", page, "--json").json
    points = list(itertools.product([-1.0, -0.2, 0.6, 1.0], WEIGHTS))
    assert [row["data"] for row in made["sweep"]] == [str(data[0]), str(data[1]), "mean"] * len(points)
    assert [row["weights"] for row in made["sweep"][::3]] == [{"style": s, "noise": n} for n, s in points]
    for a, b, mean in zip(made["sweep"][::3], made["sweep"][1::3], made["sweep"][2::3], strict=True):
        assert mean["loss"] == pytest.approx((a["loss"] + b["loss"]) / 2, abs=1e-9)
        assert mean["standard_error"] == pytest.approx((a["standard_error"] ** 2 + b["standard_error"] ** 2) ** 0.5 / 2)
        expression = f"style:{a['weights']['style']}+noise:{a['weights']['noise']}"
        assert b["loss"] == pytest.approx(loss(style_and_noise, expression, data[1]), abs=1e-5)
    assert made["best"] == min(made["sweep"][2::3], key=lambda row: row["loss"])
    losses = {tuple(row["weights"].values()): [] for row in made["sweep"]}
    for row in made["sweep"]:
        losses[tuple(row["weights"].values())].append(row["loss"])
    front = {
        point
        for point, (a, b, _) in losses.items()
        if not any((c <= a and d <= b) and (c, d) != (a, b) for c, d, _ in losses.values())
    }
    assert {tuple(row["weights"].values()) for row in made["trade_off"]} == front
    firsts = [row["losses"][str(data[0])] for row in made["trade_off"]]
    assert firsts == sorted(firsts)
    entry = style_and_noise.run("inspect", "found", "--json").json
    assert {m["adapter"]: m["weight"] for m in entry["members"]} == made["best"]["weights"]
    assert loss(style_and_noise, "found", data[0]) == pytest.approx(
        next(r["loss"] for r in made["sweep"] if r["weights"] == made["best"]["weights"]), abs=1e-9
    )
    assert made["path"] == str(page) and made["stack"] == "found"
    html = page.read_text()
    assert "cannot be improved" in html and str(style_and_noise.folder) not in html and html.count("<svg") == 4


def test_on_a_terminal_there_is_a_curve_or_a_map(style_and_noise: Any) -> None:
    data = style_and_noise.data(texts(0, 8))
    shown = style_and_noise.run("compose", "style", "--sweep", "style=0:3:0.5", "--data", data)
    assert len([line for line in shown.out.splitlines() if "█" in line]) >= 1
    assert shown.out.count("*") == 1 and "best: style " in shown.out and "nothing was written" in shown.out
    shown = style_and_noise.run(
        "compose", "style+noise", "--sweep", "style=0:3:0.5", "--sweep", "noise=0:3:1.5", "--data", data, "--dry-run",
        "--name", "s",
    ).out  # fmt: skip
    assert "noise →" in shown and "style 2.5" in shown and "nothing was written" in shown
    assert style_and_noise.run("ls", "--json").json["stacks"] == []


def test_a_method_is_swept_as_it_is_measured(style_and_noise: Any) -> None:
    data = style_and_noise.data(texts(0, 8))
    ask = ("--method", "ties", "--density", "0.5")
    made = style_and_noise.run(
        "compose", "style+noise", *ask, "--sweep", "style=0.5:1:0.5", "--data", data, "--json"
    ).json
    for row in made["sweep"]:
        style_and_noise.run("compose", f"style:{row['weights']['style']}+noise", *ask, "--name", "typed")
        assert row["loss"] == pytest.approx(loss(style_and_noise, "typed", data), abs=1e-5)


def test_what_cannot_be_swept_is_said_at_once_before_the_base_is_loaded(
    style_and_noise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("stackctl.engine.models.load_base", load)
    data, ask = style_and_noise.data(texts(0, 4)), "style=0:1:0.5"
    empty = style_and_noise.data([{"text": ""}], "empty.jsonl")
    cases: list[tuple[tuple[Any, ...], int, tuple[str, ...]]] = [
        (("--sweep", "stile=0:1:0.5", "--data", data), 2, ("stile", "did you mean 'style'")),
        (("--sweep", "style=0:1:0", "--data", data), 2, ("step",)),
        (("--sweep", "style=0:1:-0.5", "--data", data), 2, ("step",)),
        (("--sweep", "style=1:0:0.5", "--data", data), 2, ("reversed",)),
        (("--sweep", "style=nan:inf:0.5", "--data", data), 2, ("'nan'", "'inf'")),
        (("--sweep", "style=0:1:0.0001", "--data", data), 2, ("1,000",)),
        (("--sweep", "style=0:1:0.01", "--sweep", "noise=0:1:0.01", "--data", data), 2, ("10,201",)),
        (("--sweep", ask, "--sweep", "style=1:2:1", "--data", data), 2, ("twice",)),
        (("--sweep", ask, "--sweep", "style@1=1:2:1", "--data", data), 2, ("twice",)),
        (("--sweep", ask, "--sweep", "noise=0:1:1", "--sweep", "x=0:1:1", "--data", data), 2, ("3 times",)),
        (("--sweep", "style", "--data", data), 2, ("NAME=FIRST:LAST:STEP",)),
        (("--sweep", ask), 2, ("--data",)),
        (("--data", data), 2, ("--sweep",)),
        (("--sweep", ask, "--fit", data, "--data", data), 2, ("--fit", "--sweep")),
        (("--sweep", ask, "--data", data, "--per", "layer"), 2, ("--per",)),
        (("--sweep", ask, "--data", "nothing.jsonl"), 3, ("nothing.jsonl",)),
        (("--sweep", ask, "--data", empty), 2, ("empty.jsonl",)),
        (("--sweep", ask, "--data", data, "--data", data), 2, ("twice",)),
        (("--sweep", ask, "--data", data, "--output", "page.txt"), 2, ("page.txt",)),
        (("--sweep", "stile=0:1:0.5", "--data", empty, "--output", "p.txt"), 2, ("stile", "empty.jsonl", "p.txt")),
        (("--sweep", ask, "--data", data, "--name", "style"), 2, ("'style'",)),
    ]
    for arguments, code, said in cases:
        err = style_and_noise.run("compose", "style+noise", *arguments, code=code).err
        assert all(part in err for part in said), (arguments, err)
    assert style_and_noise.run("ls", "--json").json["stacks"] == [] and not Path("page.txt").exists()


def test_a_point_without_a_finite_loss_is_no_end_of_the_sweep(style_and_noise: Any) -> None:
    data = style_and_noise.data(texts(0, 6))
    made = style_and_noise.run("compose", "style", "--sweep", "style=0:1e30:1e30", "--data", data, "--json").json
    assert [row["loss"] is None for row in made["sweep"]] == [False, True] and made["best"]["weights"] == {"style": 0}
    assert "not finite" in style_and_noise.run("compose", "style", "--sweep", "style=0:1e30:1e30", "--data", data).out
    assert (
        "try smaller"
        in style_and_noise.run("compose", "style", "--sweep", "style=1e30:1e30:1", "--data", data, code=1).err
    )


def test_weights_by_layer_stay_where_they_are_not_swept(style_and_noise: Any) -> None:
    data = style_and_noise.data(texts(0, 6))
    style_and_noise.run("compose", "style", "--name", "layered")
    entry = style_and_noise.folder / "registry/stacks/layered.yaml"
    written = yaml.safe_load(entry.read_text())
    written["members"][0]["layer_weights"] = {"model.layers.0": 0.25}
    entry.write_text(yaml.safe_dump(written, sort_keys=False))
    made = style_and_noise.run("compose", "layered+noise", "--sweep", "noise=0:1:1", "--data", data, "--json").json
    assert made["sweep"][0]["weights"]["style"] == {"model.layers.0": 0.25}
    assert made["sweep"][0]["loss"] == pytest.approx(loss(style_and_noise, "layered", data), abs=1e-5)
    assert "by layer" in style_and_noise.run("compose", "layered", "--sweep", "style=0:1:1", "--data", data, code=4).err
