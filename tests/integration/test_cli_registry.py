"""The registry's commands: init, ls, use, rm, gc, verify."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from checkpoints import FINGERPRINT, make_base, register
from tiny import random_adapter

from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry
from stackctl.storage.locks import locked

# -- init -------------------------------------------------------------------------------------------------------------


def test_init_takes_one_folder(run, fails, tmp_path):
    fails("init", "one", "--registry", "two", code=2)
    (tmp_path / "link").symlink_to("nowhere")
    fails("init", "link", code=2)
    assert not (tmp_path / "one").exists() and not (tmp_path / "two").exists()
    assert run("init", "one", "--registry", tmp_path / "one", "--json").json["registry"] == str(tmp_path / "one")
    assert run("init", "--registry", "two", "--json").json["registry"] == str(tmp_path / "two")


# -- ls, use, rm ------------------------------------------------------------------------------------------------------


def test_ls_lists_everything_by_name(filled_registry, run):
    run("compose", "style+instruct", "--name", "storyteller")
    register(filled_registry, "style", seed=8)
    found = run("ls", "--json").json
    assert {"schema", "adapters", "stacks", "bases", "runs"} <= set(found)
    assert [row["name"] for row in found["adapters"]] == ["foreign", "instruct", "style", "tone"]
    assert [row["name"] for row in found["stacks"]] == ["storyteller"]
    assert [row["name"] for row in found["bases"]] == ["other", "tiny"]
    assert found["runs"] == []
    style = found["adapters"][2]
    assert [v["version"] for v in style["versions"]] == [1, 2]
    for version in style["versions"]:
        assert Path(version["path"]).is_absolute()
        assert Path(version["path"], "adapter_config.json").is_file()
    text = run("ls").out
    assert all(name in text for name in ("style@1", "style@2", "storyteller", "tiny"))
    assert run("ls", "-q").out.split() == ["foreign", "instruct", "style", "tone", "storyteller", "other", "tiny"]


def test_ls_shows_unfinished_training_apart(filled_registry, run):
    folder = filled_registry.root / "runs" / "chat" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    (folder / "stackctl_save.json").write_text("{}")
    found = run("ls", "--json").json
    assert [(row["name"], row["step"]) for row in found["runs"]] == [("chat", 4)]
    assert "chat" not in [row["name"] for row in found["adapters"]]
    assert "chat" in run("ls").out


@pytest.mark.parametrize("text", ["[]", "5", '{"on": 5}', '{"on": [5, [], ["style@1", 1]]}', "[" * 100_000, "\0"])
def test_ls_is_not_stopped_by_a_run_that_says_nonsense(filled_registry, run, text):
    folder = filled_registry.root / "runs" / "chat" / "checkpoint-4"
    folder.mkdir(parents=True)
    for path in (folder.parent / "run.json", folder / "stackctl_save.json"):
        path.write_text(text)
    found = run("ls", "--json").json
    assert [(row["name"], row["step"]) for row in found["runs"]] == [("chat", 0)]
    assert found["runs"][0]["on"] == (["style@1"] if "style" in text else [])


def everything(root):
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def test_rm_and_gc_say_in_advance_what_they_would_do(filled_registry, run, monkeypatch, tmp_path):
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "cache"))
    before = everything(filled_registry.root)
    would = run("rm", "tone", "--dry-run", "--json").json
    assert would["removed"] == ["tone@1"]
    assert would["bytes"] == sum(
        f.stat().st_size for f in (filled_registry.root / "weights" / "tone").rglob("*") if f.is_file()
    )
    assert everything(filled_registry.root) == before
    assert run("rm", "tone", "--json").json == {**would, "dry_run": False}
    assert "tone" not in run("ls", "-q").out.split()
    between = everything(filled_registry.root)
    found = run("gc", "--dry-run", "--json").json
    assert [(f["what"], f["why"], f["bytes"]) for f in found["freed"]] == [("tone@1", "removed", would["bytes"])]
    assert found["bytes"] == would["bytes"]
    assert everything(filled_registry.root) == between
    assert run("gc", "-q").out == "tone@1\n"
    assert not (filled_registry.root / "weights" / "tone").exists()
    assert run("gc", "--json").json["freed"] == []
    assert run("gc").out == "nothing to free\n"
    assert verify_registry(filled_registry)[1] == []
    assert run("add", "tone", filled_registry.root / "weights" / "style" / "1", "-q").out == "tone@2\n"


def test_gc_leaves_unfinished_training_unless_it_is_asked(filled_registry, run):
    folder = filled_registry.root / "runs" / "chat"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
    (folder / "run.json").write_text(json.dumps({"on": [["tone@1", "sha256:x", 1.0]]}))
    run("rm", "tone")
    assert run("gc", "--json").json["freed"] == []
    with locked(folder.parent / ".chat.lock", "the training"):  # it is going on
        assert run("gc", "--runs", "--json").json["freed"] == []
    for also in (["--dry-run"], []):
        assert [f["what"] for f in run("gc", "--runs", *also, "--json").json["freed"]] == ["chat", "tone@1"]
    assert run("ls", "--json").json["runs"] == []


def test_gc_frees_converted_models_when_it_is_asked(filled_registry, run, tmp_path, monkeypatch):
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "cache" / "bases"
    (models / "gguf-123").mkdir(parents=True)
    (models / "gguf-123" / "model.safetensors").write_bytes(b"x" * 9)
    (models / "mine").mkdir()
    run("gc")
    run("gc", "--cache", "--dry-run")
    assert (models / "gguf-123").is_dir()
    found = run("gc", "--cache", "--json").json
    assert [(f["what"], f["bytes"]) for f in found["freed"]] == [("gguf-123", 9)]
    assert [path.name for path in models.iterdir() if path.is_dir()] == ["mine"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The cache's folder with tokenised data of today and of five weeks ago, 5 bytes each."""
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "cache"))
    for name, age in (("0abc", 0), ("1def", 35 * 24 * 3600)):
        place = tmp_path / "cache" / "tokens" / name
        place.mkdir(parents=True)
        (place / "examples.arrow").write_bytes(b"x" * 5)
        os.utime(place, (time.time() - age, time.time() - age))
    return tmp_path / "cache"


def test_gc_frees_tokenised_data_that_nobody_used_for_long(filled_registry, run, cache):
    would = run("gc", "--dry-run", "--json").json
    assert [(f["what"], f["bytes"]) for f in would["freed"]] == [("tokens/1def", 5)]
    assert would["kept"] == {"runs": 0, "logs": 0, "cache": 5}
    assert (cache / "tokens" / "1def").is_dir()
    assert run("gc", "--json").json == {**would, "dry_run": False}
    assert [path.name for path in (cache / "tokens").iterdir()] == ["0abc"]
    assert "--cache" in run("gc").out
    assert run("gc", "--cache", "-q").out == "tokens/0abc\n"
    assert list((cache / "tokens").iterdir()) == []
    assert run("gc").out == "nothing to free\n"


def test_gc_frees_logs_of_versions_that_are_gone_and_all_of_them_when_it_is_asked(
    filled_registry, run, cache, monkeypatch
):
    monkeypatch.setattr("stackctl.registry.run_folders._HELD_TIMEOUT", 0.05)
    shutil.rmtree(cache)
    for label in ("style/1", "tone/1", "tone/2", "chat/1", "instruct/1"):
        (filled_registry.root / "logs" / label / "deep").mkdir(parents=True)
        (filled_registry.root / "logs" / label / "deep" / "events").write_bytes(b"x" * 3)
    (filled_registry.root / "runs" / "chat").mkdir(parents=True)  # its training goes on, or can
    (filled_registry.root / "logs" / "Notes of mine").mkdir()

    def left():
        return sorted(
            str(path.relative_to(filled_registry.root / "logs"))
            for path in (filled_registry.root / "logs").glob("*/[0-9]*")
        )

    run("rm", "tone@1")
    assert {f["what"] for f in run("gc", "--dry-run", "--json").json["freed"]} == {
        "tone@1",
        "logs/tone/1",
        "logs/tone/2",
    }
    found = run("gc", "--json").json
    assert {f["what"] for f in found["freed"]} == {"tone@1", "logs/tone/1", "logs/tone/2"}
    assert found["kept"] == {"runs": 0, "logs": 6, "cache": 0}
    assert left() == ["chat/1", "instruct/1", "style/1"]
    with locked(filled_registry.root / "runs" / ".style.lock", "the training"):  # the next version is being trained
        assert {f["what"] for f in run("gc", "--logs", "--json").json["freed"]} == {"logs/instruct/1"}
    assert left() == ["chat/1", "style/1"]
    assert {f["what"] for f in run("gc", "--logs", "--runs", "--json").json["freed"]} == {
        "chat", "logs/chat/1", "logs/style/1",
    }  # fmt: skip
    assert left() == [] and (filled_registry.root / "logs" / "Notes of mine").is_dir()


def test_an_empty_registry_lists_nothing(run):
    run("init")
    found = run("ls", "--json").json
    assert (found["adapters"], found["stacks"], found["bases"], found["runs"]) == ([], [], [], [])
    assert "stackctl base add" in run("ls").out


def test_use_and_compose_choose_the_current_stack(filled_registry, run, fails):
    fails("inspect", code=2)
    run("compose", "style+instruct", "--name", "one")
    run("compose", "style+tone", "--name", "two")
    assert run("inspect", "--json").json["stack"] == "two"
    assert run("use", "one", "--json").json == {"schema": 1, "stack": "one"}
    assert run("inspect", "--json").json["stack"] == "one"
    assert [row["current"] for row in run("ls", "--json").json["stacks"]] == [True, False]
    run("compose", "style", "--name", "three", "--dry-run")
    assert run("inspect", "--json").json["stack"] == "one"
    fails("use", "style", code=3)
    run("rm", "one")
    fails("inspect", code=2)


def test_rm_removes_one_version_all_versions_or_a_stack(filled_registry, run, fails):
    register(filled_registry, "tone", seed=8)
    run("compose", "style+instruct", "--name", "storyteller")
    assert run("rm", "tone@1", "--json").json["removed"] == ["tone@1"]
    assert run("inspect", "tone", "--json").json["version"] == 2
    register(filled_registry, "tone", seed=9)
    assert run("rm", "tone", "--json").json["removed"] == ["tone@2", "tone@3"]
    fails("inspect", "tone", code=3)
    run("rm", "storyteller")
    fails("use", "storyteller", code=3)
    run("verify", "instruct", code=None)


def test_rm_refuses_while_something_stands_on_it(filled_registry, run, fails):
    run("compose", "tone", "--name", "solo")
    assert "instruct@1" in fails("rm", "style", code=2)
    assert "instruct@1" in fails("rm", "style@1", code=2)
    assert "solo" in fails("rm", "tone@1", code=2)
    register(filled_registry, "style", seed=8)
    run("rm", "style@2")
    assert run("inspect", "style", "--json").json["version"] == 1
    fails("rm", "tiny", code=2)
    fails("rm", "style+tone", code=3)  # what `compose style+tone` without a name would be called
    fails("rm", "base", code=2)


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_is_clean_and_then_finds_one_flipped_byte(registry, run, fails, adapter, models, tmp_path):
    run("add", "style", adapter)
    run("add", "instruct", random_adapter(models("llama"), tmp_path / "other", seed=5), "--on", "style")
    run("compose", "style+instruct", "--name", "storyteller")
    clean = run("verify", "--json").json
    assert clean == {"schema": 1, "checked": 4, "problems": [], "restored": []}
    weights = registry / "weights" / "instruct" / "1" / "adapter_model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-3] ^= 1
    weights.write_bytes(raw)
    found = run("verify", "--json", code=5).json
    assert [problem["what"] for problem in found["problems"]] == ["instruct@1"]
    assert run("verify", "style", "--json").json["problems"] == []
    assert len(run("verify", "storyteller", "--json", code=5).json["problems"]) == 1
    assert "instruct@1" in run("verify", code=5).out
    for command in (
        ("inspect", "instruct", "--verify"),
        ("generate", "storyteller", "-p", "x"),
        ("compare", "base", "instruct", "-p", "x"),
        ("export", "storyteller", "--out", "out"),
    ):
        assert "instruct@1" in fails(*command, code=5)


def test_verify_finds_what_is_missing_or_contradicts_itself(filled_registry, run):
    run("compose", "style+tone", "--name", "duo")
    shutil.rmtree(filled_registry.root / "weights" / "tone")
    config = filled_registry.root / "weights" / "instruct" / "1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    entry = filled_registry.root / "stacks" / "duo.yaml"
    entry.write_text(entry.read_text().replace("method: sum", "method: nosuch"))
    whats = [problem["what"] for problem in run("verify", "--json", code=5).json["problems"]]
    assert {"tone@1", "instruct@1", "duo"} <= set(whats)


def test_an_entry_that_is_not_strict_yaml_is_2_and_points_at_its_line(filled_registry, fails):
    entry = filled_registry.root / "adapters" / "style.yaml"
    good = entry.read_text()
    for bad in (
        good.replace("name: style", "name: style\nname: style"),
        good.replace("name: style", "name: !!str style"),
        good + "---\nschema: 1\n",
        good.replace("name: style", "name: st\0yle"),
        good.replace("schema: 1", "schema: 2"),
        good.replace("description:", "descripton:"),
    ):
        entry.write_text(bad)
        assert "style.yaml, line" in fails("inspect", "style", code=2)


def test_a_byte_order_mark_and_crlf_are_read(filled_registry, run):
    entry = filled_registry.root / "adapters" / "style.yaml"
    entry.write_bytes(b"\xef\xbb\xbf" + entry.read_bytes().replace(b"\n", b"\r\n"))
    assert run("inspect", "style", "--json").json["version"] == 1


def test_an_adapter_whose_base_is_not_registered_is_refused(filled_registry, fails):
    (filled_registry.root / "bases" / "tiny.yaml").unlink()
    assert "tiny" in fails("inspect", "style", code=3)


def test_a_stack_composed_on_another_model_is_refused(filled_registry, run, fails):
    run("compose", "style+tone", "--name", "duo")
    Registry(filled_registry.root).write(make_base("tiny", FINGERPRINT.replace("f", "e")))
    fails("inspect", "duo", code=4)
    fails("generate", "style", "-p", "x", code=4)
