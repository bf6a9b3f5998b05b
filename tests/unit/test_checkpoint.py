"""A checkpoint is read by its configuration and header only, and neither is believed."""

import json
import os
import struct
from pathlib import Path

import pytest
from checkpoints import (
    lora_config,
    lora_tensors,
    memory_checkpoint,
    raw_safetensors,
    safetensors_bytes,
    write_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage, VerificationFailed
from stackctl.core.schema import Lora
from stackctl.lora.checkpoint import (
    Slot,
    find_checkpoint_folder,
    parse_tensor_name,
    read_checkpoint,
    read_config,
    read_info,
)
from stackctl.lora.lora_config import describe_lora
from stackctl.lora.safetensors_header import read_header


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def header_of(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return read_header(path)


def test_a_valid_header(tmp_path):
    tensors = header_of(tmp_path, safetensors_bytes({"a": (2, 3), "b": (), "c": (0, 4)}))
    assert tensors["a"].shape == (2, 3)
    assert tensors["b"].shape == ()
    assert tensors["a"].end - tensors["a"].start == 24
    assert tensors["c"].end == (tmp_path / "x.safetensors").stat().st_size


def test_tensors_may_stand_in_any_order_and_the_header_may_be_padded(tmp_path):
    header = json.dumps({"b": entry(8, 16), "a": entry(0, 8)}) + "   "
    assert header_of(tmp_path, raw_safetensors(header, b"\0" * 16)).keys() == {"a", "b"}


ok = {"a": entry(0, 8)}
LIES = {
    "empty": b"",
    "too short": b"\x01\0\0",
    "length beyond the file": raw_safetensors(ok, b"\0" * 8, length=10_000),
    "length of 2**64-1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length within the header": raw_safetensors(ok, b"\0" * 8, length=10),
    "length zero": struct.pack("<Q", 0) + b"{}",
    "not JSON": raw_safetensors("{nope", b""),
    "not UTF-8": raw_safetensors(b'{"\xff": 1}', b""),
    "UTF-16": raw_safetensors(json.dumps(ok).encode("utf-16"), b"\0" * 8),
    "byte-order mark": raw_safetensors(b"\xef\xbb\xbf" + json.dumps(ok).encode(), b"\0" * 8),
    "a list": raw_safetensors("[]"),
    "a number": raw_safetensors("5"),
    "null": raw_safetensors("null"),
    "deep nesting": raw_safetensors("[" * 100_000),
    "deep nesting in an entry": raw_safetensors('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "data missing": raw_safetensors(ok, b"\0" * 4),
    "data left over": raw_safetensors(ok, b"\0" * 12),
    "hole at the start": raw_safetensors({"a": entry(4, 8)}, b"\0" * 8),
    "hole between": raw_safetensors({"a": entry(0, 4), "b": entry(8, 12)}, b"\0" * 12),
    "overlap": raw_safetensors({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12),
    "twice the same bytes": raw_safetensors({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8),
    "backwards": raw_safetensors({"a": entry(8, 0, [2])}, b"\0" * 8),
    "negative offset": raw_safetensors({"a": entry(-8, 0, [2])}, b"\0" * 8),
    "negative shape": raw_safetensors({"a": entry(0, 8, [-1, -2])}, b"\0" * 8),
    "shape and size differ": raw_safetensors({"a": entry(0, 8, [3])}, b"\0" * 8),
    "unknown dtype": raw_safetensors({"a": entry(0, 8, [2], "F31")}, b"\0" * 8),
    "dtype is a list": raw_safetensors({"a": entry(0, 8, [2], [])}, b"\0" * 8),
    "dtype is null": raw_safetensors({"a": entry(0, 8, [2], None)}, b"\0" * 8),
    "shape is text": raw_safetensors({"a": entry(0, 4, "")}, b"\0" * 4),
    "shape is a mapping": raw_safetensors({"a": entry(0, 4, {})}, b"\0" * 4),
    "shape is null": raw_safetensors({"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 4]}}, b"\0" * 4),
    "shape of floats": raw_safetensors({"a": entry(0, 8, [2.0])}, b"\0" * 8),
    "shape of booleans": raw_safetensors({"a": entry(0, 4, [True])}, b"\0" * 4),
    "three offsets": raw_safetensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 4]}}, b"\0" * 4),
    "no offsets": raw_safetensors({"a": {"dtype": "F32", "shape": [1]}}, b"\0" * 4),
    "an entry is a list": raw_safetensors({"a": []}),
    "an entry is text": raw_safetensors({"a": "x"}),
    "an entry is null": raw_safetensors({"a": None}),
    "huge dimension": raw_safetensors({"a": entry(0, 8, [10**30, 0])}, b"\0" * 8),
    "huge product": raw_safetensors({"a": entry(0, 8, [2**62] * 60)}, b"\0" * 8),
    "huge offsets": raw_safetensors({"a": entry(2**70, 2**70 + 8, [2])}, b"\0" * 8),
    "10,000 digits": raw_safetensors('{"a":{"dtype":"F32","shape":[' + "9" * 10_000 + '],"data_offsets":[0,8]}}'),
    "NaN": raw_safetensors('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"\0" * 8),
    "the same name twice": raw_safetensors(
        f'{{"a":{json.dumps(entry(0, 8))},"a":{json.dumps(entry(0, 8))}}}', b"\0" * 8
    ),
    "the same key twice": raw_safetensors(
        '{"a":{"dtype":"F32","dtype":"I32","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8
    ),
    "a value that cannot be written": raw_safetensors('{"a": "\\ud800"}'),
    "a name that cannot be written": raw_safetensors('{"\\ud800":' + json.dumps(entry(0, 8)) + "}", b"\0" * 8),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path, lie):
    with pytest.raises(VerificationFailed) as caught:
        header_of(tmp_path, LIES[lie])
    assert caught.value.exit_code == 5
    assert "x.safetensors" in caught.value.message
    assert len(caught.value.message) < 1000


def test_a_shape_of_a_million_dimensions_is_not_multiplied(tmp_path, monkeypatch):
    """It would be a number of millions of digits."""
    multiplied = []
    monkeypatch.setattr("stackctl.lora.checkpoint.math.prod", multiplied.append)
    with pytest.raises(VerificationFailed, match="malformed"):
        header_of(tmp_path, raw_safetensors({"a": entry(0, 8, [2**62] * 1_000_000)}, b"\0" * 8))
    assert not multiplied


def test_no_file(tmp_path):
    with pytest.raises(NotFound):
        read_header(tmp_path / "x")


VALID = safetensors_bytes({"base_model.model.a.lora_A.weight": (2, 3), "base_model.model.a.lora_B.weight": (3, 2)})


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4), st.data())
def test_mutated_files_are_read_or_refused(tmp_path_factory, changes, data):
    mutated = bytearray(VALID)
    for position, value in changes:
        mutated[position] = value
    cut = data.draw(st.sampled_from([len(mutated), len(mutated) - 1, len(mutated) // 2, 9, 7]))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(bytes(mutated[:cut]))
    try:
        tensors = read_header(path)
    except StackctlError:
        return
    assert sum(t.end - t.start for t in tensors.values()) <= len(mutated)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "X"]) | json_values,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 99), min_size=2, max_size=2) | json_values,
    },
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.text(max_size=5), entries | json_values, max_size=3) | json_values, st.integers(0, 40))
def test_any_json_is_read_or_refused(tmp_path_factory, header, size):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(raw_safetensors(json.dumps(header), b"\0" * size))
    try:
        read_header(path)
    except StackctlError as error:
        error.message.encode(errors="backslashreplace")


@pytest.mark.parametrize(
    ("name", "module", "role"),
    [
        ("base_model.model.a.0.q.lora_A.weight", "a.0.q", "A"),
        ("base_model.model.a.0.q.lora_B.weight", "a.0.q", "B"),
        ("base_model.model.a.0.q.lora_A.default.weight", "a.0.q", "A"),
        ("base_model.model.a.0.q.lora_B.my-adapter.weight", "a.0.q", "B"),
        ("base_model.model.q.lora_A.weight.weight", "q", "A"),
        ("base_model.model.embed.lora_embedding_A", "embed", "A"),
        ("base_model.model.embed.lora_embedding_B", "embed", "B"),
        ("base_model.model.embed.lora_embedding_B.my-adapter", "embed", "B"),
        ("base_model.model.q.lora_B.bias", "q", "lora_bias"),
        ("base_model.model.q.lora_B.default.bias", "q", "lora_bias"),
        ("base_model.model.q.lora_magnitude_vector", "q", "magnitude"),
        ("base_model.model.q.lora_magnitude_vector.default.weight", "q", "magnitude"),
        ("base_model.model.embed.base_layer.weight", "embed", "aside"),
        ("base_model.model.q.lora_velora_embed", "q", "aside"),
        ("base_model.model.q.base_layer.bias", "q", "bias"),
        ("base_model.model.q.bias", "q", "bias"),
        ("base_model.model.lm_head.weight", "lm_head", "saved"),
        ("a.q.lora_A.weight", "a.q", "A"),
        ("base_model.model.q.lora_C.weight", "q.lora_C", "unknown"),
        ("weight", "weight", "saved"),
        ("base_model.model.keys.lora_A.weight", "keys", "A"),
        ("base_model.model.lora.lora_A.weight", "lora", "A"),
    ],
)
def test_what_a_name_says(name, module, role):
    assert parse_tensor_name(name) == Slot(module, role)


def test_a_bias_of_a_saved_module_is_saved_with_it():
    checkpoint = memory_checkpoint(
        lora_config(modules_to_save=["lm_head"]),
        lora_tensors() | {"base_model.model.lm_head.weight": (32, 8), "base_model.model.lm_head.bias": (32,)},
    )
    roles = {name: slot.role for name, slot in checkpoint.slots.items() if "lm_head" in name}
    assert set(roles.values()) == {"saved"}


def test_what_nothing_explains_is_not_taken_for_a_saved_module():
    checkpoint = memory_checkpoint(
        lora_config(modules_to_save=["lm_head"]), lora_tensors() | {"base_model.model.norm.weight": (8,)}
    )
    assert checkpoint.slots["base_model.model.norm.weight"].role == "unknown"


def test_the_bias_of_a_copied_base_layer_is_a_copy():
    names = {"base_model.model.lm_head.base_layer.bias": (32,), "base_model.model.lm_head.base_layer.weight": (32, 8)}
    copied = memory_checkpoint(lora_config(), names)
    assert {slot.role for slot in copied.slots.values()} == {"aside"}
    assert copied.parameters == 0
    trained = memory_checkpoint(lora_config(bias="lora_only"), names)
    assert trained.slots["base_model.model.lm_head.base_layer.bias"].role == "bias"


def test_a_checkpoint(tmp_path):
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "é x"))
    assert checkpoint.is_lora
    assert set(checkpoint.pairs["model.layers.1.self_attn.v_proj"]) == {"A", "B"}
    assert checkpoint.parameters == 4 * (2 * 8 + 8 * 2)
    assert checkpoint.dtype == "float32"
    assert checkpoint.bytes == 4 * checkpoint.parameters


def test_the_digest_is_of_weights_and_configuration_but_not_of_the_bases_name(tmp_path):
    digest = read_checkpoint(write_checkpoint(tmp_path / "a")).digest()
    renamed = lora_config(base_model_name_or_path="org/other")
    assert read_checkpoint(write_checkpoint(tmp_path / "b", renamed)).digest() == digest
    reordered = dict(reversed(lora_config().items()))
    assert read_checkpoint(write_checkpoint(tmp_path / "c", reordered)).digest() == digest
    assert read_checkpoint(write_checkpoint(tmp_path / "d", seed=1)).digest() != digest
    assert read_checkpoint(write_checkpoint(tmp_path / "e", lora_config(lora_alpha=5))).digest() != digest


def test_the_digest_of_a_configuration_with_odd_text(tmp_path):
    odd = lora_config(revision="\ud800é")
    assert read_checkpoint(write_checkpoint(tmp_path / "a", odd)).digest().startswith("sha256:")


def test_finding_the_folder(tmp_path):
    plain = write_checkpoint(tmp_path / "plain")
    assert find_checkpoint_folder(plain) == plain
    nested = write_checkpoint(tmp_path / "outer" / "instruct")
    assert find_checkpoint_folder(tmp_path / "outer") == nested
    deep = write_checkpoint(tmp_path / "run" / "checkpoint-5" / "style")
    assert find_checkpoint_folder(tmp_path / "run") == deep


def test_folders_that_hold_none_or_several(tmp_path):
    with pytest.raises(NotFound):
        find_checkpoint_folder(tmp_path / "x")
    with pytest.raises(Incompatible):
        find_checkpoint_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(Usage):
        find_checkpoint_folder(tmp_path / "file")
    for name in ("a", "b"):
        write_checkpoint(tmp_path / "two" / name)
    with pytest.raises(Usage) as caught:
        find_checkpoint_folder(tmp_path / "two")
    assert "a, b" in caught.value.message


def test_pickles_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path / "a")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(Incompatible) as caught:
        read_checkpoint(folder)
    assert "pickle" in caught.value.message
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(Incompatible):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "5", "null", "{}", '{"r": 8}', "{", "[" * 100_000, "\xff", '{"peft_type": ' + "9" * 10_000 + "}"]
)
def test_configurations_that_are_none(tmp_path, text):
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(Incompatible) as caught:
        read_config(tmp_path)
    assert caught.value.exit_code == 4


def test_a_configuration_with_a_byte_order_mark(tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(lora_config()).encode())
    assert read_config(tmp_path)["r"] == 2


def test_no_configuration(tmp_path):
    with pytest.raises(NotFound):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"r": 0}, {"r": -1}, {"r": "8"}, {"r": None}, {"r": 2.5}, {"r": True}, {"lora_alpha": "x"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"target_modules": 5}, {"target_modules": [1]},
        {"target_modules": {"q_proj": 1}}, {"target_modules": "("}, {"target_modules": "a{2,1}"},
        {"target_modules": "a{9999999999999}"}, {"exclude_modules": "["}, {"exclude_modules": 1},
        {"modules_to_save": "lm_head"}, {"modules_to_save": ["("]}, {"modules_to_save": 3},
        {"layers_to_transform": "3"}, {"layers_to_transform": ["3"]}, {"layers_pattern": 4}, {"layers_pattern": ["*"]},
        {"rank_pattern": ["q"]}, {"rank_pattern": {"q": "4"}}, {"rank_pattern": {"q": 0}}, {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"q": "4"}}, {"alpha_pattern": {"*": 4}}, {"alpha_pattern": {"q": float("nan")}},
        {"alpha_pattern": 3}, {"bias": "\ud800"}, {"bias": "some"}, {"bias": None}, {"bias": 3},
    ],
    ids=str,
)  # fmt: skip
def test_configurations_that_cannot_be_meant(tmp_path, change):
    with pytest.raises(Incompatible) as caught:
        read_checkpoint(write_checkpoint(tmp_path / "a", lora_config(**change)))
    assert caught.value.exit_code == 4
    assert "adapter_config.json" in caught.value.message


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "all-linear"}, {"target_modules": r".*\.(q|v)_proj"}, {"target_modules": None},
        {"layers_to_transform": 1}, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"lora_alpha": 0.5},
        {"rank_pattern": None, "alpha_pattern": None}, {"rank_pattern": {r"^model.*q_proj": 4}},
        {"some_future_key": {}},
        {"exclude_modules": ["v_proj"]}, {"modules_to_save": []}, {"bias": "all"},
    ],
    ids=str,
)  # fmt: skip
def test_configurations_as_peft_writes_them(tmp_path, change):
    assert read_checkpoint(write_checkpoint(tmp_path / "a", lora_config(**change))).is_lora


def test_other_peft_types_are_read_and_said_to_be_other(tmp_path):
    checkpoint = read_checkpoint(write_checkpoint(tmp_path / "a", {"peft_type": "IA3", "target_modules": 5}))
    assert not checkpoint.is_lora


def test_a_flag_that_is_no_flag_is_said(tmp_path):
    folder = write_checkpoint(tmp_path / "odd", config=lora_config(use_rslora="F4"))
    with pytest.raises(Incompatible, match="use_rslora"):
        read_checkpoint(folder)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    folder = write_checkpoint(tmp_path / "a")
    (folder / "adapter_config.json").unlink()
    make(folder / "adapter_config.json")
    with pytest.raises(Incompatible, match="not a regular file"):
        read_checkpoint(folder)
    make(folder / "adapter_info.json")
    assert read_info(folder) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"adapter": 1}', '{"x": ' + "[" * 100_000, "\xff", '{"\xac": 1}'])
def test_what_a_checkpoint_says_of_itself_may_be_nonsense(tmp_path, text):
    assert read_info(tmp_path) is None
    (tmp_path / "adapter_info.json").write_bytes(text.encode("latin-1"))
    assert read_info(tmp_path) is None


@pytest.mark.parametrize(
    "change", [{"r": 10**400}, {"rank_pattern": {"q_proj": 10**400}}, {"lora_alpha": 10**400}], ids=str
)
def test_a_rank_that_no_machine_could_hold(tmp_path, change):
    with pytest.raises(Incompatible, match="adapter_config"):
        read_checkpoint(write_checkpoint(tmp_path / "a", lora_config(**change)))


def test_what_a_configuration_leaves_out_is_at_pefts_default():
    config = {key: value for key, value in lora_config().items() if key not in ("r", "lora_alpha")}
    assert describe_lora(config) == Lora(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    assert describe_lora({**config, "r": None, "lora_alpha": 3}).lora_alpha == 3
