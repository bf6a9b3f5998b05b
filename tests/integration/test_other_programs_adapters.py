"""`add` of what people have that is no LoRA for a causal language model: each is refused by its own name."""

from __future__ import annotations

import json

import pytest
from checkpoints import attention, lora_config, lora_tensors, write_checkpoint

P = "base_model.model."


def write_folder(path, config=None, **files):
    """A folder with empty or given files, by their names with ``__`` for a dot."""
    path.mkdir()
    if config is not None:
        (path / "adapter_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (path / name.replace("__", ".")).write_bytes(text)
    return path


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1234\n"
MLX = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 8, "scale": 20.0}}
ADAPTERHUB = {"config": {"architecture": "lora"}, "model_class": "LlamaModel", "model_type": "llama", "name": "x"}


@pytest.mark.parametrize(
    ("config", "files", "said"),
    [
        (MLX, {"adapters__npz": b""}, "mlx-lm"),
        (ADAPTERHUB, {"pytorch_adapter__bin": b""}, "AdapterHub"),
        (None, {"pytorch_lora_weights__safetensors": b""}, "diffusers"),
        (lora_config(), {"adapter_model__safetensors": POINTER}, "git lfs pull"),
        (None, {"adapter__gguf": b"GGUF"}, "GGUF"),
        (None, {"model__safetensors": POINTER}, "git lfs pull"),
    ],
    ids=["mlx", "adapterhub", "diffusers", "lfs", "gguf", "lfs of a model"],
)
def test_a_folder_of_another_program(filled_registry, fails, tmp_path, config, files, said):
    assert said in fails("add", "x", write_folder(tmp_path / "theirs", config, **files), "--base", "tiny", code=4)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "kohya"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_A.weight", "diffusers"),
        ("model.layers.0.self_attn.q_proj.lora_a", "mlx-lm"),
    ],
)
def test_tensors_of_another_program(filled_registry, fails, tmp_path, name, said):
    folder = write_checkpoint(tmp_path / "theirs", tensors={name: (2, 8)})
    (folder / "adapter_model.safetensors").rename(folder / "lora.safetensors")
    (folder / "adapter_config.json").unlink()
    assert said in fails("add", "x", folder, "--base", "tiny", code=4)


@pytest.mark.parametrize(
    ("config", "tensors", "said"),
    [
        ({"task_type": "SEQ_CLS"}, {}, "classifies texts"),
        ({"task_type": "SEQ_CLS", "modules_to_save": ["score"]}, {f"{P}score.weight": (2, 8)}, "'score'"),
        ({"task_type": "TOKEN_CLS"}, {f"{P}classifier.weight": (2, 8)}, "classifies tokens"),
        ({"task_type": None, "modules_to_save": ["v_head"]}, {f"{P}v_head.weight": (1, 8)}, "'v_head'"),
        ({"enable_lora": [True, False, True], "merge_weights": False}, {}, "enable_lora"),
        ({}, {f"{P}{module}.lora_A.weight": (0,) for module in attention()}, "ZeRO-3"),
    ],
    ids=["task", "score", "classifier", "value head", "enable_lora", "ZeRO-3"],
)
def test_a_checkpoint_that_does_something_else(filled_registry, fails, tmp_path, config, tensors, said):
    folder = write_checkpoint(tmp_path / "theirs", lora_config(**config), lora_tensors() | tensors)
    told = fails("add", "x", folder, "--base", "tiny", code=4)
    assert said in told
    assert "configuration does not explain" not in told


@pytest.mark.parametrize(
    ("config", "module", "said"),
    [
        ({"task_type": "SEQ_2_SEQ_LM"}, "encoder.block.0.layer.0.SelfAttention.q", "T5"),
        ({"auto_mapping": {"base_model_class": "WhisperModel"}}, "model.decoder.layers.0.q", "Whisper"),
        ({"task_type": None}, "model.encoder.layers.0.self_attn.q_proj", "an encoder with a decoder"),
        ({"auto_mapping": {"base_model_class": "UNet", "parent_library": "diffusers.models"}}, "mid.to_q", "diffusers"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_kind_of_model(filled_registry, fails, tmp_path, config, module, said):
    config = lora_config(target_modules=[module.rpartition(".")[2]], **config)
    told = fails(
        "add", "x", write_checkpoint(tmp_path / "theirs", config, lora_tensors([module])), "--base", "tiny", code=4
    )
    assert said in told
    assert "use it on the base it was trained on" not in told


@pytest.mark.parametrize(
    "keys",
    [{"enable_lora": None, "merge_weights": False}, {"swift_type": "LORA", "lora_dtype": "fp32", "lorap_emb_lr": 1e-6}],
    ids=["PEFT before 0.3", "ms-swift"],
)
def test_keys_that_change_nothing_are_taken(filled_registry, run, tmp_path, keys):
    run("add", "x", write_checkpoint(tmp_path / "theirs", lora_config(**keys)), "--base", "tiny")


def test_the_newest_of_several_checkpoints_is_offered_and_a_link_to_one_is_none(filled_registry, fails, run, tmp_path):
    for number in (90, 100):
        write_checkpoint(tmp_path / "run" / f"checkpoint-{number}")
    (tmp_path / "run" / "latest").symlink_to("checkpoint-100")
    told = fails("add", "x", "run", "--base", "tiny", code=2)
    assert "run/checkpoint-100" in told.splitlines()[-1]
    assert "latest" not in told


def test_no_link_out_of_a_checkpoint_is_followed(filled_registry, run, fails, tmp_path):
    (tmp_path / "secret").write_text("a token")
    folder = write_checkpoint(tmp_path / "theirs")
    (folder / "README.md").symlink_to(tmp_path / "secret")
    (folder / "notes.txt").symlink_to("adapter_config.json")
    added = run("add", "x", folder, "--base", "tiny")
    assert "README.md" in added.err
    copied = {
        path.name: path.read_bytes()
        for path in filled_registry.weights_path(filled_registry.find_adapter("x").newest()).iterdir()
    }
    assert "README.md" not in copied
    assert copied["notes.txt"] == copied["adapter_config.json"]

    elsewhere = tmp_path / "weights"
    (folder / "adapter_model.safetensors").rename(elsewhere)
    (folder / "adapter_model.safetensors").symlink_to(elsewhere)
    for more in ([], ["--link"]):
        assert "adapter_model.safetensors" in fails("add", "y", folder, "--base", "tiny", *more, code=4)


def test_the_layout_of_the_hubs_cache_is_one_folder(filled_registry, run, tmp_path):
    repo = tmp_path / "models--me--x"
    (repo / "blobs").mkdir(parents=True)
    snapshot = write_checkpoint(repo / "snapshots" / "abc" / "style")
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repo / "blobs" / str(number))
        path.symlink_to(f"../../../blobs/{number}")
    run("add", "x", snapshot, "--base", "tiny")


def test_an_adapter_without_effect_is_said_to_be(filled_registry, run, tmp_path):
    folder = write_checkpoint(tmp_path / "zero")
    assert "without effect" not in run("add", "y", folder, "--base", "tiny").err
    weights = folder / "adapter_model.safetensors"
    raw = weights.read_bytes()
    header = 8 + int.from_bytes(raw[:8], "little")
    weights.write_bytes(raw[:header] + bytes(len(raw) - header))
    assert "without effect" in run("add", "x", folder, "--base", "tiny").err
    for what in ("x", str(folder)):
        codes = [problem["code"] for problem in run("inspect", what, "--json").json["problems"]]
        assert "no_effect" in codes


def test_a_base_that_is_named_and_not_here_is_not_another_one(filled_registry, run, fails, tmp_path):
    folder = write_checkpoint(tmp_path / "theirs", lora_config(base_model_name_or_path="who/knows"))
    assert "who/knows" in fails("add", "x", folder, code=3)
    run("add", "x", folder, "--base", "tiny")


@pytest.mark.parametrize("text", ["x" * 10_000, "+".join(["ab"] * 4000), "a b " * 2500])
@pytest.mark.parametrize(
    "command", [("generate", "{}", "-p", "x"), ("add", "{}", "nowhere"), ("rm", "{}"), ("use", "{}")]
)
def test_what_is_quoted_is_cut(filled_registry, run, command, text):
    ran = run(*[word.format(text) for word in command], code=None)
    assert ran.code
    assert 0 < len(ran.err) < 1500
