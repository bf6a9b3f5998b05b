"""Bases as they are stored: every scheme of quantisation is read or refused, names in files are not those in memory.

The oracle is transformers' own loading, with raw PEFT on top of it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stored import SCHEMES, SEEING, as_transformers_reads, mixture, quantised, say_quantised, seeing_model
from tiny import tiny_tokenizer
from transformers import AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from stackctl.registry.base_quantization import READ, plain_name, quantization_of

WORDS = [{"text": "the sea and the wind"}, {"text": "night"}, {"text": "rain fell on the harbour, and nobody came"}]


TOKENIZER = tiny_tokenizer()


def make(kind: str, folder: Path) -> Path:
    if kind in SCHEMES:
        return quantised(kind, folder)
    return mixture(folder) if kind == "mixture" else seeing_model(kind, folder)


def adapter(base: Path, out: Path, seed: int) -> Path:
    """Random factors on attention's projections of the text, made and saved by PEFT on what transformers loads."""
    torch.manual_seed(seed)
    targets = r"(?!.*(visual|vision)).*\.(q_proj|v_proj|o_proj)"
    model = get_peft_model(as_transformers_reads(base), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=targets))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2)
    model.save_pretrained(out)
    return out


def losses(model: Any) -> float:
    """The mean loss over all supervised tokens of WORDS, record by record."""
    total, count = 0.0, 0
    with torch.no_grad():
        for record in WORDS:
            ids = torch.tensor([[*TOKENIZER(record["text"])["input_ids"], 257]])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count


@pytest.mark.parametrize("kind", [*SCHEMES, *SEEING, "mixture"])
def test_a_stored_base_is_what_transformers_reads(run: Any, tmp_path: Path, kind: str) -> None:
    """One eval switches stacks; its losses, and those of the full model, are PEFT's on what transformers loads."""
    base = make(kind, tmp_path / "base")
    first, second = adapter(base, tmp_path / "first", 1), adapter(base, tmp_path / "second", 2)
    data = oracle.write_jsonl(tmp_path / "data.jsonl", WORDS)
    run("init")
    run("base", "add", "stored", base)
    run("add", "first", first)
    run("add", "second", second)
    found = run("eval", "first", "base", "second", "first", "--base", "stored", "--data", data, "--json").json
    plain = losses(as_transformers_reads(base))
    wanted = [losses(PeftModel.from_pretrained(as_transformers_reads(base), path).eval()) for path in (first, second)]
    rows = {row["stack"]: row["loss"] for row in found["results"]}
    assert rows == pytest.approx({"first": wanted[0], "base": plain, "second": wanted[1]}, abs=2e-6)
    assert min(abs(loss - plain) for loss in wanted) > 1e-3
    run("export", "first", "--format", "model", "--out", tmp_path / "full")
    assert quantization_of(json.loads((tmp_path / "full" / "config.json").read_text())) is None
    full, report = _loaded(tmp_path / "full")
    assert losses(full) == pytest.approx(wanted[0], abs=2e-6)
    assert not any(report.values())


def _loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """A plain model as the class of its configuration, with what transformers says of its keys."""
    import transformers

    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, named).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), report


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "gemma3", "qwen3_5", "mixture"])
def test_what_is_trained_on_a_stored_base_loads_in_peft(run: Any, tmp_path: Path, kind: str) -> None:
    """Trained, and trained on top of that: PEFT on the base by transformers gives the same loss, towers untouched."""
    base = make(kind, tmp_path / "base")
    data = oracle.write_jsonl(tmp_path / "data.jsonl", WORDS)
    run("init")
    run("base", "add", "stored", base)
    options = ["--data", data, "--rank", 2, "--max-steps", 3, "--learning-rate", 0.02]
    run("train", "style", "--base", "stored", *options)
    run("train", "instruct", "--on", "style", *options)
    tensors = load_file(tmp_path / "registry/weights/style/1/adapter_model.safetensors")
    assert tensors
    assert not [name for name in tensors if "vision" in name or "visual" in name]
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    found = run("eval", "style", "style+instruct", "--data", data, "--json").json["results"]
    run("export", "style+instruct", "--format", "peft", "--out", tmp_path / "peft")
    for row, path in zip(found, ("registry/weights/style/1", "peft"), strict=True):
        model = PeftModel.from_pretrained(as_transformers_reads(base), tmp_path / path).eval()
        assert row["loss"] == pytest.approx(losses(model), abs=2e-6)


def test_a_scheme_that_says_nothing_is_refused_as_transformers_does(run: Any, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(models("llama"), folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": {}}))
    run("init")
    assert "without quant_method" in run("base", "add", "odd", folder, code=4).err


@pytest.mark.parametrize("method", [*AUTO_QUANTIZER_MAPPING, "modelopt", "exl3", "bitnet-2"])
def test_every_other_scheme_is_refused_by_name(run: Any, models: Any, tmp_path: Path, method: str) -> None:
    settings: dict[str, Any] = {"quant_method": method}
    if method.startswith("bitsandbytes"):
        settings = {"quant_method": "bitsandbytes", f"load_in_{method.rpartition('_')[2]}": True}
    scheme = quantization_of({"quantization_config": settings})
    assert scheme is not None
    assert scheme.method == method
    if method in READ:
        assert method in {name.removesuffix("-static") for name in SCHEMES}, "it is read, so it has a case above"
        return
    run("init")
    for text in (False, True):  # a model that sees says it for the whole, or for its text part
        folder = tmp_path / f"tiny-{text}-AWQ"
        shutil.copytree(models("llama"), folder)
        say_quantised(folder, {"quantization_config": settings} if text else settings, "text_config" if text else
                      "quantization_config")  # fmt: skip
        ran = run("base", "add", "stored", folder, code=4)
        assert scheme.label in ran.err
        assert f"tiny-{text}\n" in ran.err
        assert "base rm" not in ran.err


def test_the_mapping_of_configurations_has_no_scheme_besides() -> None:
    assert set(AUTO_QUANTIZATION_CONFIG_MAPPING) == set(AUTO_QUANTIZER_MAPPING)
    assert set(READ) <= set(AUTO_QUANTIZER_MAPPING)


@pytest.mark.parametrize(
    ("key", "settings", "label"),
    [
        ("quantization", {"bits": 4, "group_size": 64}, "MLX"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        (
            "quantization_config",
            {"quant_method": "bitsandbytes", "_load_in_8bit": True, "load_in_8bit": True},
            "8 bits",
        ),
    ],
)
def test_schemes_that_are_written_elsewhere(
    run: Any, models: Any, tmp_path: Path, key: str, settings: dict[str, Any], label: str
) -> None:
    shutil.copytree(models("llama"), tmp_path / "model")
    say_quantised(tmp_path / "model", settings, key)
    run("init")
    assert label in run("base", "add", "stored", tmp_path / "model", code=4).err


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("unsloth/Llama-3.2-1B-bnb-4bit", "unsloth/Llama-3.2-1B"),
        ("unsloth/Qwen3-8B-unsloth-bnb-4bit", "unsloth/Qwen3-8B"),
        ("Qwen/Qwen3-8B-FP8", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-7B-Instruct"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct"),
        ("RedHatAI/Llama-3.1-8B-quantized.w4a16", "RedHatAI/Llama-3.1-8B"),
        ("RedHatAI/Llama-3.1-8B-FP8-dynamic", "RedHatAI/Llama-3.1-8B"),
        ("mlx-community/Qwen3-8B-4bit", "mlx-community/Qwen3-8B"),
        ("openai/gpt-oss-20b", None),
        ("fp8", None),
    ],
)
def test_the_plain_model_by_a_name(name: str, plain: str | None) -> None:
    assert plain_name(name) == plain


def test_four_bits_stay_as_they_are_stored_or_not_at_all(run: Any, tmp_path: Path) -> None:
    run("init")
    run("base", "add", "eight", quantised("fp8", tmp_path / "eight"))
    data = oracle.write_jsonl(tmp_path / "data.jsonl", WORDS)
    ran = run("train", "x", "--base", "eight", "--data", data, "--dtype", "nf4", "--max-steps", 1, code=4)
    assert "stored quantised already, by FP8" in ran.err


def test_weights_that_nothing_takes_are_an_error(run: Any, models: Any, tmp_path: Path) -> None:
    """As those of a scheme are that no configuration names."""
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    run("init")
    ran = run("base", "add", "stored", folder, code=4)
    assert "nothing in its configuration's model takes: model.layers.0.mlp.down_proj.weight_scale" in ran.err


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "is a T5ForConditionalGeneration"),
        ({"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}, "is a Whisper"),
        ({"model_type": "nothing-yet"}, "which transformers"),
        ({"model_type": "nothing-yet", "auto_map": {"AutoConfig": "own.Config"}}, "needs code of its own"),
    ],
)
def test_a_model_that_is_no_base_is_refused_for_its_own_reason(
    run: Any, models: Any, tmp_path: Path, config: dict[str, Any], why: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    (folder / "config.json").write_text(json.dumps(config))
    run("init")
    ran = run("base", "add", "stored", folder, code=4)
    assert why in ran.err
    assert ("code of its own" in ran.err) == ("auto_map" in config)


def test_tokens_beyond_the_embeddings_are_named(run: Any, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(models("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>", "<a>", "<b>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    run("init")
    ran = run("base", "add", "stored", folder)
    assert "<a>, <b> (260 to 261)" in ran.err
    data = oracle.write_jsonl(tmp_path / "data.jsonl", [{"text": "use <a> now"}, {"text": "plain"}, {"text": "<b>"}])
    for command in (["train", "x", "--base", "stored", "--max-steps", 1], ["eval", "base", "--base", "stored"]):
        ran = run(*command, "--data", data, code=4)
        assert "lines 1 and 3" in ran.err
        assert "<a>" in ran.err


@pytest.mark.parametrize("kind", ["llama4", "mllama", "emu3"])
def test_a_class_for_text_alone_leaves_the_towers_in_the_files(run: Any, tmp_path: Path, kind: str) -> None:
    """Their weights are taken by nothing in it, and that is no error; emu3 has no such class that finds its own."""
    from architectures import tiny_folder

    folder = tiny_folder(kind, tmp_path / "model")
    run("init")
    run("base", "add", "stored", folder)
    data = oracle.write_jsonl(tmp_path / "data.jsonl", WORDS)
    found = run("eval", "base", "--base", "stored", "--data", data, "--json").json["results"][0]["loss"]
    assert found == pytest.approx(losses(_named(folder)), abs=2e-5)


def _named(folder: Path) -> Any:
    """The class that the configuration names, towers and all; of Llama 4 the text in it, which transformers 5.24 calls
    and then asks for a number that it has not."""
    whole = _loaded(folder)[0]
    return whole.language_model if isinstance(whole, transformers.Llama4ForConditionalGeneration) else whole


@pytest.mark.parametrize("kind", ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaModel"])
def test_a_model_without_a_head_for_words_is_told_as_that(run: Any, models: Any, tmp_path: Path, kind: str) -> None:
    """Its files are of one model, and were told to be of two."""
    config = transformers.AutoConfig.from_pretrained(models("llama"))
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "base")
    run("init")
    refused = run("base", "add", "odd", tmp_path / "base", code=4).err
    assert f"it is a {kind}, which has no head for words" in refused
