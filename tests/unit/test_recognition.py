"""What other programs write is known by its own name, and what is broken of it is named whole."""

from __future__ import annotations

import json

import pytest
from checkpoints import safetensors_bytes

from stackctl.core.errors import Incompatible
from stackctl.lora.mlx import read_mlx
from stackctl.lora.recognition import recognise_folder, recognise_model
from stackctl.lora.safetensors_header import read_header


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("adapters.npz", "mlx"), ("pytorch_adapter.bin", "adapterhub"), ("head_config.json", "adapterhub"),
        ("pytorch_lora_weights.safetensors", "diffusers"), ("model_index.json", "diffusers"),
        ("unet/adapter_config.json", "diffusers"), ("adapter.gguf", "gguf_adapter"), ("notes.txt", None),
    ],
)  # fmt: skip
def test_a_folder_is_known_by_a_file_in_it(tmp_path, file, kind):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    found = recognise_folder(tmp_path, read_header)
    assert (found and found.kind) == kind


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        ("lora_unet_down_blocks_0.lora_down.weight", "kohya"), ("unet.down_blocks.0.attn.to_q.weight", "diffusers"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx"), ("model.layers.0.self_attn.q_proj.weight", None),
    ],
)  # fmt: skip
def test_a_folder_is_known_by_the_names_of_its_tensors_and_one_that_is_damaged_is_passed_over(tmp_path, tensor, kind):
    (tmp_path / "a.safetensors").write_bytes(b"no header at all")
    (tmp_path / "b.safetensors").write_bytes(safetensors_bytes({tensor: (2, 2)}))
    found = recognise_folder(tmp_path, read_header)
    assert (found and found.kind) == kind


def test_a_file_that_git_lfs_left_as_a_pointer_is_told(tmp_path):
    (tmp_path / "a.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert recognise_folder(tmp_path, read_header).kind == "git_lfs"


@pytest.mark.parametrize(
    ("config", "modules", "kind"),
    [
        ({"auto_mapping": {"parent_library": "diffusers.models"}}, ["q"], "diffusers"),
        ({"auto_mapping": {"base_model_class": "T5ForConditionalGeneration"}}, ["q"], "t5"),
        ({"base_model_name_or_path": "openai/whisper-small"}, ["model.decoder.layers.0.fc1"], "whisper"),
        ({"task_type": "SEQ_2_SEQ_LM"}, ["q"], "seq2seq"), ({}, ["model.encoder.layers.0.fc1"], "seq2seq"),
        ({}, ["down_blocks.0.attentions.0.to_q"], "diffusers"),
        ({"task_type": "FEATURE_EXTRACTION"}, ["q"], "embedding"), ({}, ["model.layers.0.self_attn.q_proj"], None),
    ],
)  # fmt: skip
def test_a_model_that_does_not_write_text_alone_is_known_by_its_configuration_or_its_modules(config, modules, kind):
    found = recognise_model(config, modules)
    assert (found and found.kind) == kind


def mlx_folder(folder, config, tensors, dtypes=None):
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapters.safetensors").write_bytes(safetensors_bytes(tensors, dtypes=dtypes))
    return folder


def test_everything_that_is_wrong_with_an_adapter_of_mlx_lm_is_told_at_once(tmp_path):
    tensors = {"q.lora_a": (8, 3), "q.lora_b": (2, 8), "e.lora_a": (4, 8, 2), "k.lora_a": (8, 2), "k.bias": (2,)}
    config = {"lora_parameters": {"rank": 2, "scale": 1.0}}
    with pytest.raises(Incompatible) as caught:
        read_mlx(mlx_folder(tmp_path, config, tensors, {"k.lora_a": "I32"}))
    wrong = ("'q.lora_a' is [8, 3]", "'e.lora_a' adapts experts", "'k.lora_a' is not a", "'k.bias'", "q has no lora_a")
    assert all(name in caught.value.message for name in wrong)
    for told, what in (({"scale": 1}, "no rank"), ({"rank": 2, "scale": "x"}, "no scale")):
        with pytest.raises(Incompatible, match=what):
            read_mlx(mlx_folder(tmp_path, {"lora_parameters": told}, {"q.lora_a": (8, 2), "q.lora_b": (2, 8)}))
    with pytest.raises(Incompatible, match="no tensors"):
        read_mlx(mlx_folder(tmp_path, {"lora_parameters": {"rank": 2, "scale": 1}}, {}))
