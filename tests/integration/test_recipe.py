"""stackctl.yaml and --config: order, what is out of date, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from registry_fixtures import why
from tiny import random_adapter

RECIPE = """\
base: tiny
train:
  instruct: {on: style, data: data/chat.jsonl, rank: 2, max_steps: 1, warmup: 0}
  style: {data: data/style.jsonl, rank: 2, max_steps: 1, warmup: 0}
stacks:
  storyteller: style:0.5+instruct
"""


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with its time and its bytes."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


# -- building ---------------------------------------------------------------------------------------------------------


def test_it_is_built_in_the_order_of_dependence(project, run):
    assert list(why(run)) == ["style", "instruct", "storyteller"]
    assert run("ls", "--json").json["adapters"] == []
    ran = run("train", "--json")
    assert len(ran.out.splitlines()) == 1
    assert [b.get("adapter") or b["stack"] for b in ran.json["built"]] == ["style", "instruct", "storyteller"]
    assert ran.json["built"][1]["on"] == ["style@1"]
    stack = run("inspect", "--json").json
    assert stack["stack"] == "storyteller"
    assert [(m["adapter"], m["weight"]) for m in stack["members"]] == [("style", 0.5), ("instruct", 1.0)]


def test_a_second_run_says_up_to_date_and_changes_no_file(project, run, monkeypatch):
    run("train", "-q")
    before = snapshot(project)
    assert run("train").out == "up to date\n"
    assert run("train", "--json").json["built"] == []
    assert run("train", "-q").out == ""
    monkeypatch.chdir(project / "data")  # the nearest recipe upward, with its data beside it
    assert run("train").out == "up to date\n"
    assert snapshot(project) == before


def test_out_of_date_is_by_bytes_settings_and_versions_never_by_time(project, run):
    run("train", "-q")
    for path in (
        project / "data" / "style.jsonl",
        project / "stackctl.yaml",
        project / "registry" / "adapters" / "style.yaml",
    ):
        os.utime(path, (1, 1))
    assert why(run) == {}
    os.utime(project / "data" / "style.jsonl", (2**33, 2**33))
    assert why(run) == {}

    text = (project / "stackctl.yaml").read_text()
    (project / "stackctl.yaml").write_text(
        "# a comment\n" + text.replace("rank: 2", "rank: 2, description: hm, alpha: null")
    )
    assert why(run) == {}
    (project / "stackctl.yaml").write_text(text.replace("on: style,", "on: style, seed: 1,"))
    assert list(why(run)) == ["instruct", "storyteller"]
    assert "seed" in why(run)["instruct"]
    (project / "stackctl.yaml").write_text(text.replace("style:0.5", "style:0.6"))
    assert list(why(run)) == ["storyteller"]
    (project / "stackctl.yaml").write_text(text)

    chats = project / "data" / "chat.jsonl"
    good = chats.read_text()
    chats.write_text(good + good)
    assert list(why(run)) == ["instruct", "storyteller"]
    chats.write_text(good)
    assert why(run) == {}

    with (project / "data" / "style.jsonl").open("a") as stream:
        stream.write('{"text": "More."}\n')
    assert list(why(run)) == ["style", "instruct", "storyteller"]
    assert run("train", "-q").out.split() == ["style@2", "instruct@2", "storyteller"]
    assert run("train").out == "up to date\n"


def test_a_newer_version_underneath_is_out_of_date(project, run, models):
    run("train", "-q")
    random_adapter(models("llama"), project / "elsewhere", r=2)
    (project / "stackctl.yaml").write_text(RECIPE.replace("  style: {", "  other: {"))
    run("add", "style", "elsewhere")
    found = why(run)
    assert "style@1" in found["instruct"]
    assert "style@2" in found["instruct"]


def test_a_stored_stack_of_the_same_words_does_not_hold_the_recipe_back(project, run):
    run("train", "-q")
    run("compose", "style+instruct")
    (project / "stackctl.yaml").write_text(RECIPE.replace("style:0.5+instruct", "style+instruct"))
    assert list(why(run)) == ["storyteller"]
    run("train", "-q")
    assert why(run) == {}
    with (project / "data" / "style.jsonl").open("a") as stream:
        stream.write('{"text": "More."}\n')
    run("train", "-q")
    members = run("inspect", "storyteller", "--json").json["members"]
    assert [(m["adapter"], m["version"]) for m in members] == [("style", 2), ("instruct", 2)]
    assert run("train").out == "up to date\n"


def test_an_adapter_may_stand_on_a_stack_of_the_recipe(project, run):
    last = "  last: {on: storyteller, data: data/style.jsonl, rank: 2, max_steps: 1, warmup: 0}\n"
    text = RECIPE.replace("stacks:\n", f"{last}stacks:\n  all: storyteller+last\n")
    (project / "stackctl.yaml").write_text(text)
    assert list(why(run)) == ["style", "instruct", "storyteller", "last", "all"]
    built = run("train", "--json").json["built"]
    assert built[3]["on"] == ["style@1:0.5", "instruct@1"]
    assert built[4]["members"] == ["style@1:0.5", "instruct@1", "last@1"]
    assert run("train").out == "up to date\n"


def test_a_pinned_version_is_not_out_of_date_when_a_newer_one_is_made(project, run):
    run("train", "-q")
    (project / "stackctl.yaml").write_text(
        RECIPE.replace("on: style,", "on: style@1,").replace(
            "rank: 2, max_steps: 1, warmup: 0}\nstacks", "rank: 1, max_steps: 1}\nstacks"
        )
    )
    assert list(why(run)) == ["style", "storyteller"]


def test_force_trains_what_is_up_to_date(project, run):
    run("train", "-q")
    assert run("train", "--force", "-q").out.split() == ["style@2", "instruct@2", "storyteller"]


def test_one_adapter_of_the_recipe_is_trained_by_its_name(project, run):
    run("train", "-q")
    found = run("train", "instruct", "--seed", "5", "--json").json
    assert (found["version"], found["on"], found["steps"]) == (2, ["style@1"], 1)


def test_a_dry_run_changes_nothing(project, run):
    before = snapshot(project)
    shown = run("train", "--dry-run").out
    assert shown.index("style") < shown.index("storyteller")
    assert snapshot(project) == before


def test_config_may_name_a_recipe(project, run, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert list(why(run, "--config", str(project / "stackctl.yaml"))) == ["style", "instruct", "storyteller"]


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: tiny\nbase: tiny\n", "line 2"),
        ("base: tiny\ntrain:\n  style: {data: x, data: y}\n", "line 3"),
        ("base: !!str tiny\n", "line 1"),
        ("base: &a tiny\n", "line 1"),
        ("base: tiny\n---\nbase: tiny\n", "line 2"),
        ("base: ti\0ny\n", "NUL"),
        ("schema: 2\nbase: tiny\n", "schema"),
        ("base: tiny\ntrian:\n  style: {data: x}\n", "'train'"),
        ("base: tiny\ntrain:\n  style:\n    data: x\n    lerning_rate: 1e-4\n", "line 5"),
        ("base: tiny\ntrain:\n  style:\n    data: x\n    lerning_rate: 1e-4\n", "'learning_rate'"),
        ("base: tiny\ntrain:\n  style: {data: x, rank: many}\n", "rank"),
        ("base: tiny\ntrain:\n  style: {data: x, rank: 0}\n", "rank"),
        ("base: tiny\ntrain:\n  base: {data: x}\n", "reserved"),
        ("base: tiny\ntrain:\n  ../style: {data: x}\n", "../style"),
        ("base: tiny\ntrain:\n  style: {data: x, on: a++b}\n", "a++b"),
        ("base: tiny\ntrain:\n  style: {data: x}\nstacks:\n  style: style\n", "both"),
        ("base: tiny\nstacks:\n  a+b: a+c\n", "a+b"),
        ("base: tiny\ntrain:\n  a: {on: b, data: x}\n  b: {on: a, data: x}\n", "circle"),
        ("base: tiny\nstacks:\n  a: b\n  b: a\n", "circle"),
        ("[1, 2]\n", "mapping"),
        ("base: {tiny\n", "line"),
        ("base: tiny\npush: {stack: x}\n", "repo"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_2(project, fails, text, said):
    (project / "stackctl.yaml").write_text(text)
    message = fails("train", code=2)
    assert "stackctl.yaml" in message
    assert said in message


def test_a_base_that_is_not_registered_is_refused(project, fails):
    (project / "stackctl.yaml").write_text(RECIPE.replace("base: tiny", "base: tinny"))
    assert "'tiny'" in fails("train", code=3)
    (project / "stackctl.yaml").write_text(RECIPE.replace("style: {data", "style: {base: nosuch, data"))
    fails("train", code=3)


def test_everything_is_checked_before_anything_is_trained(project, run, fails):
    (project / "stackctl.yaml").write_text(
        RECIPE.replace("data/chat", "data/nosuch").replace("style:0.5+instruct", "style+nobody")
    )
    said = fails("train", code=3)
    assert "nosuch.jsonl" in said
    assert "nobody" in said
    assert run("ls", "--json").json["adapters"] == []


def test_a_byte_order_mark_and_crlf_are_read(project, run):
    (project / "stackctl.yaml").write_bytes(b"\xef\xbb\xbf" + RECIPE.replace("\n", "\r\n").encode())
    assert list(why(run)) == ["style", "instruct", "storyteller"]


def test_without_a_recipe_and_without_a_name_there_is_nothing_to_train(registry, fails):
    fails("train", code=2)


def test_flags_belong_to_one_adapter(project, fails):
    fails("train", "--rank", "4", code=2)


def test_on_and_no_are_words_and_1e_5_is_a_number(project, run):
    (project / "stackctl.yaml").write_text(
        "base: tiny\ntrain:\n  no: {data: data/style.jsonl, max_steps: 1, warmup: 0, rank: 1, learning_rate: 1e-5}\n"
        "  yes: {on: no, data: data/style.jsonl, max_steps: 1, warmup: 0, rank: 1}\n"
    )
    built = run("train", "--json").json["built"]
    assert [(b["adapter"], b["on"]) for b in built] == [("no", []), ("yes", ["no@1"])]
    entry = (project / "registry" / "adapters" / "no.yaml").read_text()
    assert "learning_rate: 1e-05" in entry
