"""`add`: what is taken, what is refused, what is never opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from checkpoints import attention, lora_config, lora_tensors, write_checkpoint
from tiny import random_adapter


@pytest.fixture(scope="session")
def adapter(models, tmp_path_factory):
    """A checkpoint on the tiny Llama that PEFT wrote."""
    return random_adapter(models("llama"), tmp_path_factory.mktemp("adapter") / "style")


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
def test_a_checkpoint_that_cannot_be_used_is_4(filled_registry, run, fails, tmp_path, change):
    fails("add", "x", write_checkpoint(tmp_path / "x", lora_config(**change)), "--base", "tiny", code=4)
    assert "x" not in [row["name"] for row in run("ls", "--json").json["adapters"]]


def test_a_checkpoint_of_another_base_is_4(filled_registry, fails, tmp_path):
    missing = write_checkpoint(tmp_path / "missing", tensors=lora_tensors(attention(layers=[0])))
    fails("add", "x", missing, "--base", "tiny", code=4)
    wide = {name: tuple(2 * n if n != 2 else n for n in shape) for name, shape in lora_tensors().items()}
    fails("add", "x", write_checkpoint(tmp_path / "wide", tensors=wide), "--base", "tiny", code=4)
    (tmp_path / "nothing").mkdir()
    fails("add", "x", "nothing", "--base", "tiny", code=4)


def test_the_digest_does_not_change_with_the_bases_name_in_the_configuration(registry, run, adapter, tmp_path):
    digest = run("add", "style", adapter, "--json").json["digest"]
    folder = shutil.copytree(adapter, tmp_path / "renamed")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}, indent=4))
    assert run("add", "style", folder, "--json").json["digest"] == digest
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 9}))
    assert run("add", "style", folder, "--json").json["digest"] != digest


def test_the_base_is_the_one_that_the_checkpoint_names(registry, run, models, tmp_path):
    """Two models of one shape: nothing in the tensors would tell a wrong base."""
    twin = models("llama", seed=9)
    run("base", "add", "twin", twin)
    path = random_adapter(twin, tmp_path / "theirs")
    assert run("add", "style", path, "--json").json["base"] == "twin"
    assert run("add", "style", path, "--base", "tiny", "--json").json["base"] == "tiny"
    assert run("add", "on", path, "--on", "style", "--json").json["base"] == "tiny"
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "who/knows"}))
    ran = run("add", "other", path, "--json")
    assert ran.json["base"] == "tiny"
    assert "who/knows" in ran.err


def test_a_saved_module_that_is_missing_is_4(registry, fails, adapter, tmp_path):
    folder = shutil.copytree(adapter, tmp_path / "copy")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": ["lm_head"]}))
    assert "lm_head" in fails("add", "style", folder, code=4)
