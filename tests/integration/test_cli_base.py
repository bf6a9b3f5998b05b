"""``base add``, ``base ls`` and ``base rm``: what becomes a base, what is refused, and what a changed one does."""

from __future__ import annotations

import json
import shutil

import pytest


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


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_hidden_layers", 3, "no weights for model.layers.2."),  # transformers would make it up, and only warn
        ("intermediate_size", 72, "other shapes"),
        ("attention_bias", True, "no weights for model.layers.0.self_attn."),
        ("tie_word_embeddings", True, None),
    ],
)
def test_weights_that_are_not_the_configurations_are_refused(run, fails, models, tmp_path, key, value, told):
    run("init")
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    if told:
        assert told in fails("base", "add", "x", "model", code=4)
    else:
        run("base", "add", "x", "model")


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_a_base_with_a_broken_configuration_is_4(run, fails, models, tmp_path, text):
    run("init")
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in fails("base", "add", "x", "model", code=4)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "num_hidden_layers", "x"),
        ("config.json", "hidden_size", 3),
        ("generation_config.json", "suppress_tokens", 3),
        ("generation_config.json", "eos_token_id", "x"),
        ("tokenizer.json", "version", "["),
        ("tokenizer_config.json", "auto_map", []),
        ("tokenizer_config.json", "model_max_length", "x"),
    ],
)
def test_a_base_with_a_value_that_its_library_cannot_take_is_4(run, fails, models, tmp_path, file, key, value):
    run("init")
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {key: value}))
    assert "tokenizer" in (told := fails("base", "add", "x", "model", code=4)) or file in told


def test_base_rm_refuses_while_adapters_stand_on_it(filled_registry, run, fails):
    assert "foreign" in fails("base", "rm", "other", code=2)
    run("rm", "foreign")
    assert run("base", "rm", "other", "--json").json["removed"] == ["other"]
    assert [row["name"] for row in run("base", "ls", "--json").json["bases"]] == ["tiny"]
    fails("base", "rm", "other", code=3)


def test_a_changed_base_folder_is_5(run, fails, models, tmp_path, adapter):
    run("init")
    folder = shutil.copytree(models("llama"), tmp_path / "model")
    run("base", "add", "tiny", folder)
    assert run("inspect", "tiny", "--verify", "--json").json["verified"] is True
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
    fails("inspect", "tiny", "--verify", code=5)
    found = run("verify", "--json", code=5).json["problems"]
    assert [problem["what"] for problem in found] == ["tiny"]
    assert run("ls", "--json").json["adapters"][0]["versions"][0]["version"] == 1
