"""Where an adapter begins: apart from what it stands on, and with ``--orthogonal`` apart from it for good."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_registry import TEXTS, interrupt

LONG = ("--max-steps", 12, "--save-steps", 2)


def first_factors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for k, t in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in k}


def row_overlap(h: Any, stack: str) -> tuple[float, float]:
    """The mean and the largest row overlap over the modules, by ``inspect --interference`` itself."""
    [pair] = h.run("inspect", stack, "--interference", "--json").json["interference"]["pairs"]
    rows = [module["rows"] for module in pair["modules"]]
    assert rows
    return sum(rows) / len(rows), max(rows)


def test_members_of_a_stack_begin_in_different_subspaces(h: Any) -> None:
    """Raw PEFT with one seed draws one A for all; here what an adapter stands on has a say in it."""
    h.train("style", "--max-steps", 3, records=TEXTS)
    h.train("instruct", "--max-steps", 3, on="style")
    mean, _ = row_overlap(h, "style+instruct")
    chance = 4 / 32  # rank 4 of 32 directions
    assert mean < 2 * chance
    h.train("twin", "--max-steps", 3)  # on the bare base, where the seed alone decides, as ever
    assert row_overlap(h, "style+twin")[0] > 0.5


def test_the_beginning_follows_from_the_recipe(h: Any) -> None:
    h.add("style", seed=1)
    h.add("tone", seed=2)
    still = ("--max-steps", 1, "--learning-rate", 1e-30)
    for name, on, more in (
        ("first", "style", ()), ("again", "style", ()), ("halved", "style:0.5", ()), ("other", "tone", ()),
        ("seeded", "style", ("--seed", 1)), ("live", "style", ("--frozen", "live")),
    ):  # fmt: skip
        h.train(name, *still, *more, on=on)
    drawn = {name: first_factors(h.weights(name)) for name in ("first", "again", "halved", "other", "seeded", "live")}
    key = next(iter(drawn["first"]))
    for name, same in (("again", True), ("live", True), ("halved", False), ("other", False), ("seeded", False)):
        assert torch.equal(drawn["first"][key], drawn[name][key]) is same, name
    seeds = {name: h.run("inspect", name, "--json").json["run"]["initial_seed"] for name in drawn}
    assert seeds["first"] == seeds["again"] != seeds["halved"]
    h.train("bare", *still)
    assert h.run("inspect", "bare", "--json").json["run"]["initial_seed"] == 0


@pytest.mark.parametrize("frozen", ["fold", "live"])
def test_orthogonal_rows_stay_orthogonal(h: Any, frozen: str) -> None:
    h.add("style", seed=1)
    h.add("tone", seed=2)
    whole = h.train("new", "--orthogonal", "--weight-decay", 0.1, "--frozen", frozen, *LONG, on="style:0.5+tone")
    assert whole["loss"] > 0
    for below in ("style", "tone"):
        assert row_overlap(h, f"{below}+new")[1] < 1e-6
    assert h.run("inspect", "new", "--json").json["settings"]["orthogonal"] is True
    log = h.log("new")
    assert log[-1]["loss"] < log[0]["loss"], "what is left to it is learned with"
    h.train("free", "--frozen", frozen, *LONG, on="style:0.5+tone")
    assert row_overlap(h, "style+free")[1] > 1e-3, "without the option nothing keeps them apart"


def test_a_resumed_run_stays_orthogonal(h: Any) -> None:
    h.add("style", seed=1)
    h.train("whole", "--orthogonal", *LONG, on="style")
    h.at_step(5, interrupt)
    h.train("new", "--orthogonal", *LONG, on="style", code=130)
    other = h.train("new", *LONG, "--resume", on="style", code=2)["error"]["message"]
    assert "orthogonal" in other
    h.at_step(0, interrupt)
    h.train("new", "--orthogonal", *LONG, "--resume", on="style")
    new, whole = first_factors(h.weights("new")), first_factors(h.weights("whole"))
    assert all(torch.equal(new[key], whole[key]) for key in whole)
    assert row_overlap(h, "style+new")[1] < 1e-6


@pytest.mark.usefixtures("forked_ranks")
def test_two_processes_stay_orthogonal(h: Any) -> None:
    h.add("style", seed=1)
    two = h.train("new", "--orthogonal", "--num-processes", 2, "--batch-size", 2, "--max-steps", 4, on="style")
    assert two["processes"] == 2
    assert row_overlap(h, "style+new")[1] < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_orthogonal_rows_of_other_layers(tiny_registry: Any, name: str) -> None:
    """Transposed weights, and experts, of which each has rows of its own."""
    h = tiny_registry(name)
    h.train("style", "--max-steps", 3, records=TEXTS)
    h.train("new", "--orthogonal", "--max-steps", 3, on="style")
    assert row_overlap(h, "style+new")[1] < 1e-6


def test_orthogonal_is_refused_where_it_cannot_be(h: Any) -> None:
    alone = h.train("new", "--orthogonal", code=2)["error"]
    assert "--on" in alone["hint"]
    h.add("style", seed=1, r=16)
    full = h.train("new", "--orthogonal", "--rank", 17, on="style", code=4)["error"]["message"]
    assert "32 directions" in full
    config = h.folder / "fsdp.yaml"
    config.write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    sharded = h.train("new", "--orthogonal", "--accelerate-config", config, on="style", code=2)["error"]["message"]
    assert "FSDP" in sharded
    assert h.adapters() == {"style"}
