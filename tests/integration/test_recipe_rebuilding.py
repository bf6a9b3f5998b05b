"""What makes a part of a recipe out of date and what does not, and a building that breaks off in the middle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import warm
from registry_fixtures import why

STYLE = "data: style.jsonl, rank: 2, max_steps: 2, warmup: 0"
CHAT = "on: style, data: chat.jsonl, rank: 2, max_steps: 2, warmup: 0"


@pytest.fixture
def project(registry: Path, tmp_path: Path) -> Any:
    """``write(style=…, chat=…)`` writes the recipe."""
    (tmp_path / "style.jsonl").write_text('{"text": "The tide."}\n{"text": "A lamp."}\n')
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")

    def write(style: str = STYLE, chat: str = CHAT, stacks: str = "  both: style+chat\n", more: str = "") -> None:
        text = f"base: tiny\ntrain:\n  style: {{{style}}}\n  chat: {{{chat}}}\nstacks:\n{stacks}{more}"
        (tmp_path / "stackctl.yaml").write_text(text)

    write()
    return write


def built(run: Any, *flags: str) -> list[str]:
    return run("train", "-q", *flags).out.split()


def test_the_same_said_otherwise_is_up_to_date(project: Any, run: Any, tmp_path: Path) -> None:
    built(run)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "copy.jsonl").write_bytes((tmp_path / "style.jsonl").read_bytes())
    for style in (
        f"{STYLE}, alpha: 4", f"{STYLE}, alpha: 4.0", f"{STYLE}, keep: last", f"{STYLE}, learning_rate: 0.0002",
        f"{STYLE}, target_modules: ALL-LINEAR", f"{STYLE}, description: other words", f"{STYLE}, save_steps: 1",
        "rank:   2 ,max_steps:   2,  warmup: 0.0, data: ./elsewhere/copy.jsonl # comment\n  ", f"{STYLE}, on: base",
        f"{STYLE}, base: tiny", f"{STYLE}, report_to: none",
    ):  # fmt: skip
        project(style=style)
        assert why(run) == {}, style
        assert run("train").out == "up to date\n"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("alpha: 5", "alpha"), ("seed: 1", "seed"), ("target_modules: 'q_proj,v_proj'", "target_modules"),
        ("pack: true", "pack"), ("dtype: bfloat16", "dtype"), ("use_rslora: true", "use_rslora"),
    ],
)  # fmt: skip
def test_other_settings_are_named(project: Any, run: Any, other: str, said: str) -> None:
    built(run)
    project(style=f"{STYLE}, {other}")
    assert list(why(run)) == ["style", "chat", "both"]
    assert why(run)["style"] == f"other {said}"


def test_targets_as_a_list_and_as_text_are_the_same(project: Any, run: Any) -> None:
    project(style=f"{STYLE}, target_modules: [v_proj, q_proj]")
    built(run)
    project(style=f"{STYLE}, target_modules: 'q_proj, v_proj'")
    assert why(run) == {}


def test_a_default_that_changed_since_is_out_of_date(project: Any, run: Any, tmp_path: Path) -> None:
    built(run)
    entry = tmp_path / "registry" / "adapters" / "style.yaml"
    assert "learning_rate: 0.0002" in entry.read_text()
    entry.write_text(entry.read_text().replace("learning_rate: 0.0002", "learning_rate: 0.0001"))
    assert why(run)["style"] == "other learning_rate"


def test_data_that_were_others_in_between_make_a_version_that_is_up_to_date(
    project: Any, run: Any, tmp_path: Path
) -> None:
    """The trap: training is deterministic, so the third version has the bytes of the first."""
    built(run)
    data = tmp_path / "style.jsonl"
    good = data.read_text()
    data.write_text(good + '{"text": "More."}\n')
    assert built(run) == ["style@2", "chat@2", "both"]
    data.write_text(good)
    assert list(why(run)) == ["style", "chat", "both"]
    built(run)
    assert why(run) == {}
    assert run("train").out == "up to date\n"
    newest = run("ls", "--json").json
    versions = {a["name"]: a["versions"] for a in newest["adapters"]}
    members = run("inspect", "both", "--json").json["members"]
    assert [m["version"] for m in members] == [versions["style"][-1]["version"], versions["chat"][-1]["version"]]
    assert versions["style"][-1]["digest"] == versions["style"][0]["digest"]
    assert versions["chat"][-1]["trained_on"] == [f"style@{versions['style'][-1]['version']}"]


def test_removed_versions_and_stacks_are_made_again(project: Any, run: Any) -> None:
    built(run)
    run("rm", "both")
    assert why(run) == {"both": "not composed yet"}
    run("rm", "chat")
    assert list(why(run)) == ["chat", "both"]
    assert built(run) == ["chat@2", "both"], "a number is never given twice"
    project(chat=f"{CHAT}, seed: 1")
    assert built(run) == ["chat@3", "both"]
    run("rm", "both")
    run("rm", "chat@3")
    assert why(run)["chat"] == "other seed"
    project()
    assert list(why(run)) == ["both"]


@pytest.mark.parametrize("name", ["style", "chat"])
@pytest.mark.parametrize("gone", [".", "adapter_model.safetensors"])
def test_weights_that_are_gone_are_made_again(project: Any, run: Any, tmp_path: Path, name: str, gone: str) -> None:
    import shutil

    built(run)
    path = tmp_path / "registry" / "weights" / name / "1" / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert why(run)[name] == "its weights are missing"
    built(run)
    assert why(run) == {}


def test_what_was_built_before_a_failure_stays_and_the_rest_is_built_later(project: Any, run: Any) -> None:
    project(chat=f"{CHAT}, learning_rate: 1e30, max_steps: 5".replace("max_steps: 2, ", ""))
    failed = run("train", code=1)
    assert failed.out == ""
    assert "style@1" in failed.err.splitlines()[-3], "what is done is said"
    assert failed.err.splitlines()[-2].startswith("error: chat: ")
    assert {a["name"] for a in run("ls", "--json").json["adapters"]} == {"style"}
    project()
    assert built(run) == ["chat@1", "both"]
    assert run("train").out == "up to date\n"


_KILLED = """
import contextlib, os, signal
import stackctl.cli.progress

@contextlib.contextmanager
def progress(output, name):
    yield lambda step, steps, counters: os.kill(os.getpid(), signal.SIGKILL) if (name, step) == ("chat", 3) else None

stackctl.cli.progress.training_progress = progress
"""


def test_a_killed_building_is_resumed(project: Any, run: Any, tmp_path: Path) -> None:
    chat = CHAT.replace("max_steps: 2", "max_steps: 5, dropout: 0.3")
    project(chat=chat)
    built(run)
    wanted = run("inspect", "chat", "--json").json["digest"]
    run("rm", "both")
    run("rm", "chat")
    run("rm", "style")
    project(chat=f"{chat}, save_steps: 2")
    first = tmp_path / "first"
    first.mkdir()
    (first / "sitecustomize.py").write_text(_KILLED)
    killed = warm.run(["train"], tmp_path, {**os.environ, "PYTHONPATH": str(first)}, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert [(r["name"], r["step"]) for r in run("ls", "--json").json["runs"]] == [("chat", 2)]
    resumed = run("train", "--resume", "--json")
    assert [b.get("adapter") or b["stack"] for b in resumed.json["built"]] == ["chat", "both"]
    assert "step 3/5" in resumed.err and "step 1/5" not in resumed.err
    assert run("inspect", "chat", "--json").json["digest"] == wanted


def test_nothing_to_do_needs_no_torch(project: Any, run: Any, tmp_path: Path) -> None:
    project(style=f"{STYLE}, eval_data: style.jsonl, patience: 3")
    built(run)
    code = (
        "import sys\nfrom stackctl.cli import main\nsys.argv = ['stackctl', 'train']\ntry:\n    main()\n"
        "finally:\n    print(sorted({'torch', 'transformers', 'peft', 'numpy'} & set(sys.modules)))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == "up to date\n[]\n", ran.stderr


def test_the_table_of_a_dry_run_names_every_part_and_why(project: Any, run: Any) -> None:
    built(run)
    project(chat=f"{CHAT}, seed: 3", stacks="  both: style+chat\n  half: style:0.5\n")
    lines = [line.split(None, 2) for line in run("train", "--dry-run").out.splitlines()]
    rows = {row[1]: row[2].strip() for row in lines if len(row) == 3}
    assert rows["style"] == "up to date"
    assert rows["chat"] == "other seed"
    assert "chat" in rows["both"]
    assert rows["half"] == "not composed yet"


def test_rebase_begins_at_the_own_version_when_what_is_beneath_changed(project: Any, run: Any, tmp_path: Path) -> None:
    chat = f"{CHAT}, rebase: true"
    project(chat=chat)
    [first] = [step for step in run("train", "--dry-run", "--json").json["plan"] if step["name"] == "chat"]
    assert (first["why"], first["from"]) == ("style is made anew", None), "there is nothing yet to begin at"
    assert built(run) == ["style@1", "chat@1", "both"]
    assert run("train").out == "up to date\n"
    project(style=f"{STYLE}, seed: 1", chat=chat)
    planned = run("train", "--dry-run", "--json").json["plan"]
    assert [(step["name"], step["from"]) for step in planned] == [("style", None), ("chat", "chat@1"), ("both", None)]
    assert "begins at chat@1" in run("train", "--dry-run").out
    ran = run("train", "--json")
    moved = next(b for b in ran.json["built"] if b.get("adapter") == "chat")
    assert (moved["version"], moved["on"], moved["from"]) == (2, ["style@2"], "chat@1")
    assert "chat@1 was trained on style@1; on style@2 it begins where that one stands" in ran.err
    entry = run("inspect", "chat@2", "--json").json
    assert (entry["from"], entry["trained_on"]) == ("chat@1", ["style@2"])
    assert run("train").out == "up to date\n", "begun at its own version, which the recipe does not name"
    project(style=f"{STYLE}, seed: 1", chat=f"{chat}, learning_rate: 1e-5")
    assert run("train", "--dry-run", "--json").json["plan"][1] == {
        "kind": "adapter", "name": "chat", "why": "other learning_rate", "from": None,
    }, "nothing beneath changed"  # fmt: skip


def test_rebase_looks_at_digests_and_at_what_kind_of_adapter_is_asked_for(project: Any, run: Any) -> None:
    chat = f"{CHAT}, rebase: true"
    project(chat=chat)
    built(run)
    project(style=f"{STYLE}, seed: 1", chat=chat)
    run("train", "style")
    project(chat=chat)
    assert built(run) == ["style@3", "both"], "the same bytes as style@1, on which chat@1 stands"
    assert run("train").out == "up to date\n"
    assert [a for a in built(run, "--force") if a.startswith("chat")] == ["chat@2"]
    project(style=f"{STYLE}, seed: 2", chat=chat.replace("rank: 2", "rank: 1"))
    assert run("train", "--dry-run", "--json").json["plan"][1]["from"] is None, "a lower rank is another adapter"
    project(style=f"{STYLE}, seed: 2", chat=chat.replace("rank: 2", "rank: 3"))
    assert built(run)[1] == "chat@3"
    assert "from" not in run("inspect", "chat@3", "--json").json


def test_rebase_and_another_beginning_contradict_each_other(project: Any, run: Any) -> None:
    for more, said in (("from: style", "rebase begins"), ("orthogonal: true", "orthogonal would change")):
        project(chat=f"{CHAT}, rebase: true, {more}")
        assert said in run("train", "--json", code=2).json["error"]["message"]


def test_rebase_on_the_command_line(project: Any, run: Any) -> None:
    project(chat=f"{CHAT}, rebase: true")
    built(run)
    run("train", "style", "--seed", 1)
    assert run("train", "chat", "--json").json["from"] == "chat@1", "a job of the recipe by its name"
    ran = run("train", "chat", "--json")
    assert ran.json["from"] is None
    assert "chat@2 stands on just this: it begins at nothing" in ran.err
    assert run("train", "chat", "--no-rebase", "--on", "style@1", "--json").json["from"] is None
    assert run("train", "chat", "--rebase", "--on", "style@2", "--json").json["from"] == "chat@4"
    assert run("train", "chat", "--from", "chat@1", "--json").json["from"] == "chat@1"
