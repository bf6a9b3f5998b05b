"""The registry's commands: add, ls, rm, use, base, verify. DESIGN §6."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from checkpoints import FINGERPRINT, attention, lora_config, lora_tensors, make_base, register, write_checkpoint
from tiny import random_adapter

from stackctl.registry import Registry


@pytest.fixture(scope="session")
def adapter(models, tmp_path_factory):
    """A checkpoint on the tiny Llama that PEFT wrote."""
    return random_adapter(models("llama"), tmp_path_factory.mktemp("adapter") / "style")


# -- base -------------------------------------------------------------------------------------------------------------


def test_base_add_tells_its_five_keys(run, models):
    run("init")
    found = run("base", "add", "tiny", models("llama"), "--json").json
    assert {"schema", "name", "source", "revision", "fingerprint", "path"} <= set(found)
    assert (found["schema"], found["name"], found["revision"]) == (1, "tiny", None)
    assert found["path"] == str(models("llama"))
    assert found["fingerprint"].startswith("sha256:")
    assert run("base", "add", "again", models("llama"), "-q").out == "again\n"
    rows = run("base", "ls", "--json").json["bases"]
    assert [row["name"] for row in rows] == ["again", "tiny"]
    assert rows[1] | {"schema": 1} == found
    assert run("base", "ls", "-q").out == "again\ntiny\n"


def test_base_add_takes_a_relative_folder_with_spaces_and_unicode(run, models, tmp_path):
    run("init")
    folder = tmp_path / "мои модели" / "小 лама"
    shutil.copytree(models("llama"), folder)
    assert run("base", "add", "tiny", "мои модели/小 лама", "--json").json["path"] == str(folder)
    assert run("generate", "base", "-p", "x", "--max-new-tokens", "2", "--json").json["new_tokens"] <= 2
    assert run("verify", "--json").json["problems"] == []


def test_adding_a_base_twice_is_the_same_base_and_another_under_its_name_is_2(registry, run, fails, models):
    before = (registry / "bases" / "tiny.yaml").read_bytes()
    run("base", "add", "tiny", models("llama"))
    assert (registry / "bases" / "tiny.yaml").read_bytes() == before
    fails("base", "add", "tiny", models("llama", seed=7), code=2)


def test_a_folder_that_is_no_base_is_refused(registry, fails, adapter, models, tmp_path):
    (tmp_path / "empty").mkdir()
    fails("base", "add", "x", "empty", code=4)
    assert "stackctl add" in fails("base", "add", "x", adapter, code=2)
    pickled = tmp_path / "pickled"
    shutil.copytree(models("llama"), pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    fails("base", "add", "x", "pickled", code=4)


def test_base_rm_refuses_while_adapters_stand_on_it(shelf, run, fails):
    assert "foreign" in fails("base", "rm", "other", code=2)
    run("rm", "foreign")
    assert run("base", "rm", "other", "--json").json["removed"] == ["other"]
    assert [row["name"] for row in run("base", "ls", "--json").json["bases"]] == ["tiny"]
    fails("base", "rm", "other", code=3)


def test_a_changed_base_folder_is_5(run, fails, models, tmp_path, adapter):
    run("init")
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    run("base", "add", "tiny", folder)
    run("add", "style", adapter)
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n')
    for command in (
        ("generate", "style", "-p", "x"),
        ("eval", "style", "--data", "x.jsonl"),
        ("train", "more", "--on", "style", "--data", "x.jsonl", "--max-steps", "1"),
    ):
        fails(*command, code=5)
    found = run("verify", "--json", code=5).json["problems"]
    assert [problem["what"] for problem in found] == ["tiny"]
    assert run("ls", "--json").json["adapters"][0]["versions"][0]["version"] == 1


# -- add --------------------------------------------------------------------------------------------------------------


def test_add_tells_its_five_keys_and_copies(registry, run, adapter):
    found = run("add", "style", adapter, "--json").json
    assert {"schema", "adapter", "version", "digest", "base", "path"} <= set(found)
    assert (found["adapter"], found["version"], found["base"]) == ("style", 1, "tiny")
    path = Path(found["path"])
    assert path == registry / "weights" / "style" / "1"
    assert (path / "adapter_model.safetensors").read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()
    assert run("add", "tone", adapter, "-q").out == "tone@1\n"


def test_adding_twice_is_the_same_version(registry, run, adapter):
    first = run("add", "style", adapter, "--json").json
    entry = (registry / "adapters" / "style.yaml").read_bytes()
    assert run("add", "style", adapter, "--json").json == first
    assert (registry / "adapters" / "style.yaml").read_bytes() == entry


def test_other_bytes_are_the_next_version(registry, run, adapter, models, tmp_path):
    run("add", "style", adapter)
    other = random_adapter(models("llama"), tmp_path / "other", seed=5)
    assert run("add", "style", other, "-q").out == "style@2\n"
    assert [v["version"] for v in run("ls", "--json").json["adapters"][0]["versions"]] == [1, 2]


def test_a_trainers_checkpoint_folder_is_added_without_its_state(registry, run, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "output" / "checkpoint-531")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps({"state": name}))
    (folder / "trainer_state.json").write_text('{"global_step": 531}')
    (folder / "tokenizer_config.json").write_text("{}")
    path = Path(run("add", "style", "output/checkpoint-531", "--json").json["path"])
    names = {file.name for file in path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer_config.json"} <= names
    assert not {name for name in names if name.endswith((".pt", ".pth", ".bin"))} | (names & {"trainer_state.json"})
    run("verify")


def test_a_checkpoint_nested_in_a_sub_folder_is_found(registry, run, fails, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "output" / "style")
    (tmp_path / "output" / "README.md").write_text("x")
    assert run("add", "style", "output", "--json").json["adapter"] == "style"
    shutil.copytree(adapter, tmp_path / "output" / "second")
    assert "second" in fails("add", "more", "output", code=2)


def test_link_refers_to_the_folder_and_rm_leaves_it(registry, run, adapter):
    found = run("add", "style", adapter, "--link", "--json").json
    assert found["path"] == str(adapter)
    assert not (registry / "weights" / "style").exists()
    run("verify")
    run("rm", "style")
    assert (adapter / "adapter_model.safetensors").is_file()


def test_on_records_what_it_was_trained_on(registry, run, fails, adapter, models, tmp_path):
    run("add", "style", adapter)
    other = random_adapter(models("llama"), tmp_path / "other", seed=5)
    assert run("add", "instruct", other, "--on", "style", "--json").json["on"] == ["style@1"]
    assert run("inspect", "instruct", "--json").json["needs"] == ["style@1"]
    fails("add", "more", other, "--on", "nosuch", code=3)


class Bomb:
    """A pickle that leaves a mark when somebody opens it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


def test_only_a_pickle_is_4_and_it_is_not_opened(registry, fails, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "pickled")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    fails("add", "style", folder, code=4)
    fails("inspect", folder, code=4)
    assert not (tmp_path / "boom").exists()


def test_pickles_beside_safetensors_are_neither_opened_nor_copied(registry, run, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "both")
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    path = Path(run("add", "style", folder, "--json").json["path"])
    assert not (path / "adapter_model.bin").exists()
    assert not (tmp_path / "boom").exists()


def test_truncated_weights_are_5(registry, run, fails, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "cut")
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:size])
        fails("add", "style", folder, code=5)
    assert run("ls", "--json").json["adapters"] == []


def poisoned(source: Path, target: Path, value: float) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    tensors = load_file(target / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_5_when_read(registry, run, fails, adapter, tmp_path, value):
    run("add", "style", poisoned(adapter, tmp_path / "poisoned", value), code=None)
    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n')
    fails("generate", "style", "-p", "x", code=5)
    fails("eval", "style", "--data", "x.jsonl", code=5)
    fails("train", "more", "--on", "style", "--data", "x.jsonl", "--max-steps", "1", code=5)
    fails("export", "style", "--out", "out", code=5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"}, {"use_dora": True}, {"target_modules": ["nosuch"]}, {"r": 3}, {"r": "many"},
        {"target_modules": "("}, {"bias": "some"}, {"peft_type": None},
    ],
    ids=str,
)  # fmt: skip
def test_a_checkpoint_that_cannot_be_used_is_4(shelf, run, fails, tmp_path, change):
    fails("add", "x", write_checkpoint(tmp_path / "x", lora_config(**change)), "--base", "tiny", code=4)
    assert "x" not in [row["name"] for row in run("ls", "--json").json["adapters"]]


def test_a_checkpoint_of_another_base_is_4(shelf, fails, tmp_path):
    missing = write_checkpoint(tmp_path / "missing", tensors=lora_tensors(attention(layers=[0])))
    fails("add", "x", missing, "--base", "tiny", code=4)
    wide = {name: tuple(2 * n if n != 2 else n for n in shape) for name, shape in lora_tensors().items()}
    fails("add", "x", write_checkpoint(tmp_path / "wide", tensors=wide), "--base", "tiny", code=4)
    (tmp_path / "nothing").mkdir()
    fails("add", "x", "nothing", "--base", "tiny", code=4)


# -- ls, use, rm ------------------------------------------------------------------------------------------------------


def test_ls_lists_everything_by_name(shelf, run):
    run("compose", "style+instruct", "--name", "storyteller")
    register(shelf, "style", seed=8)
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


def test_ls_shows_unfinished_training_apart(shelf, run):
    folder = shelf.root / "runs" / "chat" / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    found = run("ls", "--json").json
    assert [(row["name"], row["step"]) for row in found["runs"]] == [("chat", 4)]
    assert "chat" not in [row["name"] for row in found["adapters"]]
    assert "chat" in run("ls").out


def test_an_empty_registry_lists_nothing(run):
    run("init")
    found = run("ls", "--json").json
    assert (found["adapters"], found["stacks"], found["bases"], found["runs"]) == ([], [], [], [])
    assert "stackctl base add" in run("ls").out


def test_use_and_compose_choose_the_current_stack(shelf, run, fails):
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


def test_rm_removes_one_version_all_versions_or_a_stack(shelf, run, fails):
    register(shelf, "tone", seed=8)
    run("compose", "style+instruct", "--name", "storyteller")
    assert run("rm", "tone@1", "--json").json["removed"] == ["tone@1"]
    assert not (shelf.root / "weights" / "tone" / "1").exists()
    assert run("inspect", "tone", "--json").json["version"] == 2
    register(shelf, "tone", seed=9)
    assert run("rm", "tone", "--json").json["removed"] == ["tone@2", "tone@3"]
    assert not (shelf.root / "weights" / "tone").exists()
    fails("inspect", "tone", code=3)
    run("rm", "storyteller")
    fails("use", "storyteller", code=3)
    run("verify", "instruct", code=None)


def test_rm_refuses_while_something_stands_on_it(shelf, run, fails):
    run("compose", "tone", "--name", "solo")
    assert "instruct@1" in fails("rm", "style", code=2)
    assert "instruct@1" in fails("rm", "style@1", code=2)
    assert "solo" in fails("rm", "tone@1", code=2)
    register(shelf, "style", seed=8)
    run("rm", "style@2")
    assert run("inspect", "style", "--json").json["version"] == 1
    fails("rm", "tiny", code=2)
    fails("rm", "style+tone", code=2)
    fails("rm", "base", code=2)


# -- verify -----------------------------------------------------------------------------------------------------------


def test_verify_is_clean_and_then_finds_one_flipped_byte(registry, run, fails, adapter, models, tmp_path):
    run("add", "style", adapter)
    run("add", "instruct", random_adapter(models("llama"), tmp_path / "other", seed=5), "--on", "style")
    run("compose", "style+instruct", "--name", "storyteller")
    clean = run("verify", "--json").json
    assert clean == {"schema": 1, "checked": 4, "problems": []}
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


def test_verify_finds_what_is_missing_or_contradicts_itself(shelf, run):
    run("compose", "style+tone", "--name", "duo")
    shutil.rmtree(shelf.root / "weights" / "tone")
    config = shelf.root / "weights" / "instruct" / "1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    entry = shelf.root / "stacks" / "duo.yaml"
    entry.write_text(entry.read_text().replace("method: sum", "method: nosuch"))
    whats = [problem["what"] for problem in run("verify", "--json", code=5).json["problems"]]
    assert {"tone@1", "instruct@1", "duo"} <= set(whats)


def test_an_entry_that_is_not_strict_yaml_is_2_and_points_at_its_line(shelf, fails):
    entry = shelf.root / "adapters" / "style.yaml"
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


def test_a_byte_order_mark_and_crlf_are_read(shelf, run):
    entry = shelf.root / "adapters" / "style.yaml"
    entry.write_bytes(b"\xef\xbb\xbf" + entry.read_bytes().replace(b"\n", b"\r\n"))
    assert run("inspect", "style", "--json").json["version"] == 1


def test_an_adapter_whose_base_is_not_registered_is_refused(shelf, fails):
    (shelf.root / "bases" / "tiny.yaml").unlink()
    assert "tiny" in fails("inspect", "style", code=3)


def test_a_stack_composed_on_another_model_is_refused(shelf, run, fails):
    run("compose", "style+tone", "--name", "duo")
    Registry(shelf.root)._write(make_base("tiny", FINGERPRINT.replace("f", "e")))
    fails("inspect", "duo", code=4)
    fails("generate", "style", "-p", "x", code=4)


def test_the_digest_does_not_change_with_the_bases_name_in_the_configuration(registry, run, adapter, tmp_path):
    digest = run("add", "style", adapter, "--json").json["digest"]
    folder = shutil.copytree(adapter, tmp_path / "renamed")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}, indent=4))
    assert run("add", "style", folder, "--json").json["digest"] == digest
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    assert run("add", "style", folder, "--json").json["digest"] != digest
