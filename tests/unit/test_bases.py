"""A base is recognised by what it is, whatever it is called and however it lies on the disk."""

import json
import os
from pathlib import Path

import pytest
from checkpoints import lora_config, make_registry, register, safetensors_bytes, write_checkpoint

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage
from stackctl.registry import base_models as bases

TENSORS = {"model.embed_tokens.weight": (32, 8), "model.layers.0.q.weight": (8, 8), "lm_head.weight": (32, 8)}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "torch_dtype": "float32",
    "transformers_version": "4",
    "_name_or_path": "a",
}


def write_base(folder, config=None, tensors=None, seed=0):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors or TENSORS, seed=seed))
    return folder


def write_shards(folder, groups, config=None):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    weight_map = {}
    for number, (tensors, data) in enumerate(groups):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        (folder / name).write_bytes(data)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_the_fingerprint_is_of_the_model_and_not_of_its_place(tmp_path):
    first = bases.fingerprint(write_base(tmp_path / "a"))
    assert first.startswith("sha256:")
    assert bases.fingerprint(write_base(tmp_path / "ü b")) == first
    saved_again = CONFIG | {"torch_dtype": "bfloat16", "dtype": "x", "transformers_version": "5", "_name_or_path": "/b"}
    assert bases.fingerprint(write_base(tmp_path / "c", dict(reversed(saved_again.items())))) == first


@pytest.mark.parametrize(
    "change",
    [
        {"config": CONFIG | {"hidden_size": 9}},
        {"seed": 1},
        {"tensors": TENSORS | {"extra": (1,)}},
        {"tensors": {**TENSORS, "lm_head.weight": (8, 32)}},
        {"tensors": {name.replace("layers", "blocks"): shape for name, shape in TENSORS.items()}},
    ],
    ids=str,
)
def test_another_model_has_another_fingerprint(tmp_path, change):
    assert bases.fingerprint(write_base(tmp_path / "a")) != bases.fingerprint(write_base(tmp_path / "b", **change))


def test_a_change_at_the_end_of_a_large_tensor_is_seen(tmp_path):
    folder = write_base(tmp_path / "a", tensors={"w": (1000, 100)})
    before = bases.fingerprint(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    for position in (-1, -200_000, -399_990):  # last, middle, first
        data[position] ^= 1
        path.write_bytes(bytes(data))
        after = bases.fingerprint(folder)
        assert after != before
        before = after


def test_shards_change_nothing(tmp_path):
    """The same tensors, cut into files one by one and in another order."""
    whole = safetensors_bytes(TENSORS)
    header = bases.read_header(write_base(tmp_path / "whole") / "model.safetensors")
    groups = []
    for name, info in reversed(header.items()):
        alone = bytearray(safetensors_bytes({name: info.shape}))
        alone[-(info.end - info.start) :] = whole[info.start : info.end]
        groups.append(([name], bytes(alone)))
    sharded = write_shards(tmp_path / "sharded", groups)
    assert bases.fingerprint(sharded) == bases.fingerprint(tmp_path / "whole")
    assert len(bases.weight_files(sharded)) == 3
    bases.weight_files(sharded)[1].unlink()
    with pytest.raises(NotFound):
        bases.fingerprint(sharded)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    write_base(tmp_path / "secret")
    folder = write_base(tmp_path / "a")
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    for name in (
        "../secret/model.safetensors",
        "x/../../secret/model.safetensors",
        str(tmp_path / "a/shard.safetensors"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        with pytest.raises(Incompatible, match="outside its folder"):
            bases.weight_files(folder)


def test_shards_may_lie_in_folders_below_as_transformers_reads_them(tmp_path):
    """Of two files of one name the one that is named counts, not the one beside the index."""
    folder = write_base(tmp_path / "a")
    whole = bases.fingerprint(folder)
    (folder / "sub").mkdir()
    (folder / "model.safetensors").rename(folder / "sub" / "shard.safetensors")
    (folder / "shard.safetensors").write_bytes(safetensors_bytes(TENSORS, seed=9))
    index = {"metadata": {}, "weight_map": dict.fromkeys(TENSORS, "sub/shard.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert bases.weight_files(folder) == [folder / "sub" / "shard.safetensors"]
    assert bases.fingerprint(folder) == whole


def test_of_two_sets_of_weights_those_are_meant_that_transformers_reads(tmp_path):
    """One file goes before an index that an earlier save left behind, and what the configuration names before both."""
    folder = write_shards(tmp_path / "a", [(TENSORS, safetensors_bytes(TENSORS, seed=1))])
    [shard] = bases.weight_files(folder)
    assert shard.name == "model-00000-of-00001.safetensors"
    single = folder / "model.safetensors"
    single.write_bytes(safetensors_bytes(TENSORS))
    assert bases.weight_files(folder) == [single]

    def name(value):
        (folder / "config.json").write_text(json.dumps({**CONFIG, "transformers_weights": value}))

    name("model.safetensors.index.json")
    assert bases.weight_files(folder) == [shard]
    name(shard.name)
    assert bases.weight_files(folder) == [shard]
    for value, kind in (("weights.bin", Incompatible), (5, Incompatible), ("gone.safetensors", NotFound)):
        name(value)
        with pytest.raises(kind):
            bases.weight_files(folder)


@pytest.mark.parametrize(
    "index", ["{}", "[]", "5", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 5, "b": "x"}}',
              '{"weight_map": {"a": null}}', '{"weight_map": {"a": ""}}', '{"weight_map": {"a": ".."}}',
              "[" * 100_000, "\xff"],
    ids=lambda text: text[:30],
)  # fmt: skip
def test_an_index_that_is_none(tmp_path, index):
    folder = write_base(tmp_path / "a")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    with pytest.raises(StackctlError) as caught:
        bases.weight_files(folder)
    assert caught.value.exit_code in (3, 4)


def test_folders_that_are_no_base(tmp_path):
    with pytest.raises(NotFound):
        bases.check_model_folder(tmp_path / "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(Usage):
        bases.check_model_folder(tmp_path / "file")
    with pytest.raises(Incompatible):
        bases.check_model_folder(tmp_path)
    with pytest.raises(Usage) as caught:
        bases.check_model_folder(write_checkpoint(tmp_path / "adapter", lora_config()))
    assert "stackctl add" in caught.value.hint
    folder = write_base(tmp_path / "a")
    assert bases.check_model_folder(folder) == folder
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(Incompatible) as caught:
        bases.check_model_folder(folder)
    assert "pickle" in caught.value.message


def test_a_damaged_base(tmp_path):
    folder = write_base(tmp_path / "a")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StackctlError) as caught:
        bases.fingerprint(folder)
    assert caught.value.exit_code == 5
    (folder / "config.json").write_text("nope")
    with pytest.raises(Incompatible):
        bases.fingerprint(folder)


def test_json_is_an_object(tmp_path):
    (tmp_path / "x").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert bases.read_json(tmp_path / "x") == {"a": 1}
    with pytest.raises(NotFound):
        bases.read_json(tmp_path / "y")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("STACKCTL_CACHE", "/c")
    assert bases.cache_root() == Path("/c")
    monkeypatch.delenv("STACKCTL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert bases.cache_root() == Path("/x/stackctl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert bases.cache_root() == Path.home() / ".cache" / "stackctl"


def test_the_embedded_model_is_found_without_importing_it(monkeypatch):
    found = bases.embedded_gguf()
    assert found is None or found.suffix == ".gguf"
    monkeypatch.setattr(bases, "EMBEDDED", "no-such-distribution")
    assert bases.embedded_gguf() is None


def test_a_pipe_in_place_of_a_configuration_is_not_waited_for(run, tmp_path):
    """The digest of a version is taken of whatever stands in the place of its files."""
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    config = registry.root / "weights" / "style" / "1" / "adapter_config.json"
    config.unlink()
    os.mkfifo(config)
    with pytest.raises(Incompatible, match="not a regular file"):
        bases.read_json(config)
    run("inspect", "style", code=3)
    run("verify", code=5)
