"""``train --config``: YAML, JSON, and the JSON of older scripts."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny import random_adapter

from stackctl.registry.store import Registry

RECIPE = "base: tiny\ntrain: {style: {data: data/style.jsonl}}\n"


def planned(run, *arguments):
    """What train would do, down to its settings."""
    return run("train", *arguments, "--dry-run", "--json").json


def test_a_flag_beats_the_file_and_the_file_beats_the_defaults(project, run):
    (project / "job.yaml").write_text("data: data/style.jsonl\nrank: 5\nlearning_rate: 1e-5\nscheduler: linear\n")
    settings = planned(run, "style", "--config", "job.yaml", "--rank", "7")["settings"]
    assert (settings["rank"], settings["learning_rate"], settings["scheduler"]) == (7, 1e-5, "linear")
    assert settings["epochs"] == 3


def test_every_option_is_a_key_of_the_file(project, run):
    values = {
        "optimizer": "adamw-8bit",
        "data": "data/style.jsonl", "eval_data": "data/style.jsonl", "base": "tiny", "rank": 3, "alpha": 7,
        "dropout": 0.1, "target_modules": ["q_proj"], "use_rslora": True, "orthogonal": False, "epochs": 2,
        "max_steps": 3, "batch_size": 2,
        "gradient_accumulation": 2, "max_length": 99, "pack": True, "learning_rate": 0.001, "scheduler": "constant",
        "warmup": 0.1, "weight_decay": 0.01, "seed": 4, "dtype": "float32", "frozen": "live", "description": "x",
        "save_steps": 2, "report_to": "none", "eval_steps": 3, "keep": "last", "patience": 4,
        "chat_template_kwargs": {"enable_thinking": False}, "enable_thinking": False,
        "rebase": False, "objective": "sft", "train_tokens": "<|im_end|>", "label_smoothing": 0.0, "sft_weight": 0.0,
    }  # fmt: skip
    (project / "job.json").write_text(json.dumps(values))
    settings = planned(run, "style", "--config", "job.json")["settings"]
    assert {key: values.get(key) for key in settings} == settings


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("data: x\nranc: 3\n", "'rank'"), ("data: x\nranc: 3\n", "line 2"), ("data: x\nrank: many\n", "line 2"),
        ("rank: 2\nlora_r: 3\n", "twice"), ("rank: 2\nrank: 3\n", "twice"), ("[]", "mapping"),
        ("data: x\nname: ../x\nrank: 2", "../x"), ("data: x\nname: 5\n", "'name' is no text"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_configuration_is_2(project, fails, text, said):
    (project / "job.yaml").write_text(text)
    assert said in fails("train", "style", "--config", "job.yaml", code=2)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, 10**30) for option in (
            "--max-length", "--batch-size", "--gradient-accumulation", "--max-steps", "--save-steps", "--eval-steps",
            "--patience",
        )),
        *(("--chat-template-kwargs", text) for text in ('{"a": [1]}', '{"a": null}', '{"a": 1e400}', '{"a": 1%s}')),
    ],
)  # fmt: skip
def test_what_no_entry_can_hold_is_refused(project, fails, option, value):
    """A number of more than 64 bits was trained with, and the entry could not be read again: with all versions."""
    data = "data/style.jsonl"
    asked = value % ("0" * 30) if isinstance(value, str) and "%" in value else value
    fails("train", "style", "--data", data, "--eval-data", data, option, asked, code=2)
    if option == "--chat-template-kwargs":
        fails("base", "add", "other", Registry(project / "registry").find_base("tiny").source, option, asked, code=2)


def test_a_configuration_of_accelerate_that_is_nowhere_is_3(project, fails):
    (project / "job.yaml").write_text('data: data/style.jsonl\naccelerate_config: "\\0"\n')
    fails("train", "style", "--config", "job.yaml", code=3)


def test_a_recipe_is_no_configuration_of_one_adapter(project, fails):
    assert "stackctl train --config stackctl.yaml" in fails("train", "style", "--config", "stackctl.yaml", code=2)


OLDER = {
    "base_model_name": "tiny", "dataset_path": "data/chat.jsonl", "output_dir": "./output/instruct", "lora_r": 2,
    "lora_alpha": 4, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"], "num_train_epochs": 1,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-4, "max_seq_length": 64,
    "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "logging_steps": 10, "seed": 42,
}  # fmt: skip


@pytest.fixture
def older(project, run, models):
    """Write an older script's configuration; style@1 is registered from output/checkpoint-531."""
    checkpoint = random_adapter(models("llama"), project / "output" / "checkpoint-531", r=2)
    run("add", "style", checkpoint)
    (project / "stackctl.yaml").unlink()

    def write(**changes):
        (project / "older.json").write_text(json.dumps(OLDER | changes, indent=2))
        return "older.json"

    return write


def test_the_json_of_older_scripts_trains(older, run, project):
    config = older(stage1_adapter_path="style")
    found = run("train", "instruct", "--config", config, "--json")
    assert (found.json["on"], found.json["steps"], found.json["adapter"]) == (["style@1"], 1, "instruct")
    assert "output_dir" in found.err
    assert not (project / "output" / "instruct").exists()
    lora = run("inspect", "instruct", "--json").json["lora"]
    assert (lora["r"], lora["lora_alpha"], sorted(lora["target_modules"])) == (2, 4, ["q_proj", "v_proj"])


def test_the_first_stage_may_be_an_expression_or_a_path(older, run, project, tmp_path):
    registered = project / "registry" / "weights" / "style" / "1"
    shutil.copytree(project / "output" / "checkpoint-531", tmp_path / "nested" / "style")
    for value, on in (
        ("style@1", ["style@1"]),
        ("style:0.5", ["style@1:0.5"]),
        (str(registered), ["style@1"]),
        ("registry/weights/style/1/", ["style@1"]),
        ("./output/checkpoint-531", ["style@1"]),  # copied at `add`: known by its digest
        ("nested", ["style@1"]),
        (None, []),
        ("", []),
    ):
        assert planned(run, "instruct", "--config", older(stage1_adapter_path=value))["on"] == on


def test_a_linked_first_stage_is_known_by_its_place(older, run, models, project):
    linked = random_adapter(models("llama"), project / "elsewhere", r=2, seed=4)
    run("add", "linked", linked, "--link")
    assert planned(run, "x", "--config", older(stage1_adapter_path="elsewhere"))["on"] == ["linked@1"]


def test_a_first_stage_that_is_not_registered_is_3_and_says_how(older, fails, models, project):
    random_adapter(models("llama"), project / "new one", r=2, seed=4)
    said = fails("train", "x", "--config", older(stage1_adapter_path="new one"), code=3)
    assert "stackctl add style" in said.partition(" | ")[2]
    assert "new one" in said.partition(" | ")[2]
    fails("train", "x", "--config", older(stage1_adapter_path="./nosuch/checkpoint-9"), code=3)
    assert "'style'" in fails("train", "x", "--config", older(stage1_adapter_path="stile"), code=3)


def test_the_base_may_be_a_hub_id_or_a_folder(older, run, fails, models, project):
    entry = project / "registry" / "bases" / "tiny.yaml"
    entry.write_text(entry.read_text().replace("hub_id: null", "hub_id: Org/Tiny-Base"))
    for value in ("Org/Tiny-Base", "org/tiny-base", str(models("llama")), "tiny"):
        assert planned(run, "x", "--config", older(base_model_name=value))["base"] == "tiny"
    said = fails("train", "x", "--config", older(base_model_name="Org/Other-7B"), code=3)
    assert "stackctl base add other-7b Org/Other-7B" in said.partition(" | ")[2]


def test_a_configuration_may_name_its_adapter(older, run, fails):
    assert planned(run, "--config", older(name="instruct"))["adapter"] == "instruct"
    assert planned(run, "other", "--config", older(name="instruct"))["adapter"] == "other"
    assert "stackctl train NAME --config" in fails("train", "--config", older(), code=2)


def test_unknown_keys_and_wrong_values_are_named_together(project, fails):
    (project / "job.yaml").write_text("data: x.jsonl\nlearning_rat: 1e-5\nepoch: 3\nrank: -1\nlora_r: 4\n")
    found = fails("train", "style", "--config", "job.yaml", code=2)
    for said in ("line 2", "'learning_rat'", "line 3", "'epoch'", "line 4", "rank: expected", "'rank' is given twice"):
        assert said in found
    assert "'learning_rate'" in found
    assert "'epochs'" in found


def test_a_folder_is_looked_for_where_its_digest_is(older, run, models, project, monkeypatch):
    """A place is resolved link by link, which takes seconds for a hundred thousand versions."""
    run("add", "another", random_adapter(models("llama"), project / "elsewhere", r=2, seed=4))
    resolve, places = Registry.weights_path, []
    monkeypatch.setattr(Registry, "weights_path", lambda self, v: places.append(v.path) or resolve(self, v))
    folder = project / "registry" / "weights" / "style" / "1"
    assert planned(run, "x", "--config", older(stage1_adapter_path=str(folder)))["on"] == ["style@1"]
    assert set(places) == {"weights/style/1"}
    (folder / "adapter_model.safetensors").write_bytes(b"changed")
    run("train", "x", "--dry-run", "--config", older(stage1_adapter_path=str(folder)), code=5)
