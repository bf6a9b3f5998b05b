"""Adapters by the names that other classes, other versions and wrappers gave them, against PEFT on the right ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from architectures import tiny_folder
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stored import as_transformers_reads, mixture, seeing_model
from tiny import SIZES, random_adapter, save_adapter, tiny_tokenizer
from tiny_registry import TinyRegistry

from stackctl.engine.models import load_base
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.store import Registry

PLAIN = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True)
    apart = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(apart, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({**PLAIN, **config}))
    return folder


def pairs(shapes: dict[str, tuple[int, int]], rank: int = 4) -> dict[str, torch.Tensor]:
    """Random factors, by PEFT's names, for modules of shape (out, in)."""
    torch.manual_seed(1)
    return {
        f"base_model.model.{name}.lora_{p}.weight": 0.2 * torch.randn(*((rank, i) if p == "A" else (o, rank)))
        for name, (o, i) in shapes.items()
        for p in "AB"
    }


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    made = {name.replace(old, new, 1): tensor for name, tensor in tensors.items()}
    assert set(made) != set(tensors)
    return made


def linear(model: Any, *ends: str, inside: str = "") -> dict[str, tuple[int, int]]:
    return {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(ends) and inside in name
    }


def logits(model: Any) -> torch.Tensor:
    return oracle.logits(model.eval())


def folded(folder: Path, base: str, name: str, *, live: bool = False) -> torch.Tensor:
    registry = Registry(folder / "registry")
    stacked = load_base(resolve_base(registry, base), registry, dtype="float32")
    stacked.use(read_plan(registry, resolve_expression(registry, name)), live=live)
    return logits(stacked.model)


def exported(run: Any, folder: Path, base: Path, name: str) -> list[torch.Tensor]:
    """Logits of both exports: the adapter in PEFT on the class of the configuration, and the full model."""
    run("export", name, "--format", "peft", "--out", folder / "peft")
    run("export", name, "--format", "model", "--out", folder / "full")
    return [
        logits(PeftModel.from_pretrained(as_transformers_reads(base), folder / "peft")),
        logits(as_transformers_reads(folder / "full")),
    ]


@pytest.fixture
def seeing(run: Any, tmp_path: Path) -> Any:
    def make(name: str) -> Path:
        base = mixture(tmp_path / name) if name == "mixture" else seeing_model(name, tmp_path / name)
        run("init")
        run("base", "add", "b", base)
        return base

    return make


@pytest.mark.parametrize(
    ("kind", "inside", "others"),
    [
        ("qwen3_5", "model.", ["model.language_model.", "language_model.model.", "language_model.", ""]),
        ("gemma3", "model.language_model.", ["language_model.model.", "model.", "model.model.", "model.text_model."]),
        ("qwen2_5_vl", "model.language_model.", ["model.", "language_model.model."]),
        ("mistral3", "model.language_model.", ["language_model.model.", "model."]),
        ("llava", "model.language_model.", ["language_model.model.", "model."]),
    ],
)
def test_one_decoder_by_every_way_to_it(
    run: Any, seeing: Any, tmp_path: Path, kind: str, inside: str, others: list[str]
) -> None:
    base = seeing(kind)
    tensors = pairs(linear(as_transformers_reads(base), *ALL, inside=inside + "layers"))
    regex = r"(?!.*(vision|visual)).*\.(" + "|".join(ALL) + ")"
    wanted = logits(PeftModel.from_pretrained(as_transformers_reads(base), write(
        tmp_path / "own", tensors, target_modules=regex)))  # fmt: skip
    plain = logits(as_transformers_reads(base))
    for number, other in enumerate(others):
        made = renamed(tensors, f"base_model.model.{inside}", f"base_model.model.{other}")
        run("add", f"a{number}", write(tmp_path / f"a{number}", made, target_modules=regex))
        assert oracle.relative(folded(tmp_path, "b", f"a{number}"), wanted, plain) < 1e-5
    for found in exported(run, tmp_path, base, "a0"):
        assert oracle.relative(found, wanted, plain) < 1e-5


def test_the_class_that_sees_live_is_the_text_class_with_its_adapter(run: Any, seeing: Any, tmp_path: Path) -> None:
    """PEFT attaches nothing of an adapter that was made on Qwen3.5's whole class to its text class."""
    base = seeing("qwen3_5")
    whole = transformers.AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32)
    path = write(
        tmp_path / "a", pairs(linear(whole, "q_proj", "v_proj", inside="language_model")),
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
    )  # fmt: skip
    run("add", "a", path)
    plain, wanted = logits(whole), logits(PeftModel.from_pretrained(whole, path))
    assert oracle.relative(folded(tmp_path, "b", "a"), wanted, plain) < 1e-5
    assert oracle.relative(folded(tmp_path, "b", "a", live=True), wanted, plain) < 1e-5


def test_an_export_for_the_class_that_sees(run: Any, seeing: Any, tmp_path: Path) -> None:
    """PEFT on the whole class computes the same; vLLM, which serves that class, is not given other names in silence."""
    base = seeing("qwen3_5")
    tensors = pairs(linear(as_transformers_reads(base), *ALL))
    run("add", "a", write(tmp_path / "a", tensors, target_modules=ALL))
    codes = [problem["code"] for problem in run("inspect", "a", "--for", "vllm", "--json", code=None).json["problems"]]
    assert "vllm_names" in codes
    run("export", "a", "--format", "peft", "--whole-class", "--out", tmp_path / "whole")
    assert all("model.language_model.layers." in n for n in load_file(tmp_path / "whole/adapter_model.safetensors"))
    whole = transformers.AutoModelForMultimodalLM.from_pretrained(base, dtype=torch.float32)
    plain = logits(whole)
    wanted = logits(PeftModel.from_pretrained(as_transformers_reads(base), tmp_path / "a"))
    found = logits(PeftModel.from_pretrained(whole, tmp_path / "whole"))
    assert oracle.relative(found, wanted, plain) < 1e-5
    told = run("inspect", tmp_path / "whole", "--base", "b", "--for", "vllm", "--json", code=None).json["problems"]
    assert "vllm_names" not in [problem["code"] for problem in told]


def test_an_adapter_on_a_tower_is_not_put_on_the_text(h: Any) -> None:
    """Layer for layer the names end alike, and the shapes fit."""
    for number, tower in enumerate(("model.vision_tower.encoder", "vision_model", "audio_tower", "model.visual")):
        shapes = {f"{tower}.layers.{i}.self_attn.q_proj": (32, 32) for i in (0, 1)}
        path = write(h.folder / f"a{number}", pairs(shapes), target_modules=["q_proj"])
        assert f"modules that tiny does not have: {tower}" in h.run("add", "a", path, code=4).err


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("base_model.model.", "base_model.model._orig_mod."),
        ("base_model.", "module.base_model."),
        ("base_model.model.", "base_model.model.base_model.model."),
        ("base_model.model.", "base_model.model.module."),
        (".self_attn.", "._orig_mod.self_attn."),
        (".self_attn.", "._fsdp_wrapped_module._checkpoint_wrapped_module.self_attn."),
        (".weight", ".default.weight"),
    ],
)
def test_wrappers_are_no_part_of_a_name(h: Any, old: str, new: str) -> None:
    path = random_adapter(h.base, h.folder / "own", seed=1, target_modules=["q_proj", "v_proj"])
    tensors = load_file(path / "adapter_model.safetensors")
    h.run("add", "a", write(h.folder / "a", renamed(tensors, old, new)))
    h.run("add", "own", path)
    h.paths["own"] = path
    stacked = h.load()
    assert h.error(stacked, "own", ("own", 1.0)) < 1e-5
    assert torch.equal(h.logits(stacked, "a"), h.logits(stacked, "own"))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_every_expert_on_its_own(run: Any, tmp_path: Path, kind: str) -> None:
    """As transformers 4 had them: a LoRA on each projection of each expert, which PEFT puts together when it loads."""
    base = tmp_path / "base"
    if kind == "qwen3_moe":
        mixture(base)
        experts, names = "mlp.experts", {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
    else:
        torch.manual_seed(0)
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.15)
        model.save_pretrained(base)
        tiny_tokenizer().save_pretrained(base)
        experts, names = "block_sparse_moe.experts", {"w1": (64, 32), "w3": (64, 32), "w2": (32, 64)}
    shapes = {
        f"model.layers.{layer}.{experts}.{expert}.{name}": shape
        for layer in (0, 1) for expert in range(4) for name, shape in names.items()
    } | {f"model.layers.{layer}.self_attn.q_proj": (32, 32) for layer in (0, 1)}  # fmt: skip
    path = write(tmp_path / "a", pairs(shapes), target_modules=["q_proj", *names])
    run("init")
    run("base", "add", "b", base)
    run("add", "a", path)
    eager = {"experts_implementation": "eager"}
    load = lambda p: transformers.AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32, **eager)  # noqa: E731
    plain, wanted = logits(load(base)), logits(PeftModel.from_pretrained(load(base), path))
    assert oracle.relative(folded(tmp_path, "b", "a"), wanted, plain) < 1e-5
    assert oracle.relative(folded(tmp_path, "b", "a", live=True), wanted, plain) < 1e-5
    for found in exported(run, tmp_path, base, "a"):
        assert oracle.relative(found, wanted, plain) < 1e-5
    some = {name: tensor for name, tensor in pairs(shapes).items() if ".experts.3." not in name}
    ran = run("add", "some", write(tmp_path / "some", some, target_modules=["q_proj", *names]), code=4)
    assert "experts" in ran.err


def test_a_router_that_was_a_linear_layer(run: Any, models: Any, tmp_path: Path) -> None:
    base = models("mixtral")
    shapes = {f"model.layers.{i}.block_sparse_moe.gate": (4, 32) for i in (0, 1)}
    shapes |= {f"model.layers.{i}.self_attn.q_proj": (32, 32) for i in (0, 1)}
    path = write(tmp_path / "a", pairs(shapes), target_modules=["q_proj", "gate"])
    run("init")
    run("base", "add", "b", base)
    run("add", "a", path)
    eager = {"experts_implementation": "eager"}
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **eager)  # noqa: E731
    plain, wanted = logits(load()), logits(PeftModel.from_pretrained(load(), path))
    assert oracle.relative(folded(tmp_path, "b", "a"), wanted, plain) < 1e-5


EMBEDDINGS = ("model.embed_tokens", "lm_head")


def whole(rows: int, form: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(rows)
    ends = {"short": [""], "long": ["", ".modules_to_save", ".original_module"]}[form]
    return {f"base_model.model.{name}{end}.weight": 0.2 * torch.randn(rows, 32) for name in EMBEDDINGS for end in ends}


@pytest.mark.parametrize(
    ("form", "config"), [("short", {"modules_to_save": ["embed_tokens", "lm_head"]}), ("short", {}),
                         ("long", {"modules_to_save": ["embed_tokens", "lm_head"]})]
)  # fmt: skip
def test_saved_embeddings_are_read_as_peft_reads_them(h: Any, form: str, config: dict[str, Any]) -> None:
    """Under PEFT's long names beside its short one, and where nothing targets them: the short name is what counts."""
    own = random_adapter(h.base, h.folder / "own", seed=1, target_modules=["q_proj"])
    tensors = load_file(own / "adapter_model.safetensors")
    path = write(h.folder / "a", tensors | whole(260, form), target_modules=["q_proj"], **config)
    h.run("add", "a", path)
    h.paths["a"] = path
    assert h.error(h.load(), "a", ("a", 1.0)) < 1e-5
    assert "weight 1" in h.run("compose", "a:0.5", code=4).err


def test_more_rows_than_the_base_has_are_refused_with_both_numbers(h: Any) -> None:
    own = random_adapter(h.base, h.folder / "own", seed=1, target_modules=["q_proj"])
    tensors = load_file(own / "adapter_model.safetensors")
    for number, (form, config) in enumerate((("short", {}), ("long", {"modules_to_save": [*EMBEDDINGS]}))):
        path = write(h.folder / f"a{number}", tensors | whole(264, form), target_modules=["q_proj"], **config)
        ran = h.run("add", f"a{number}", path, code=4)
        assert "264 rows and that of tiny 260" in ran.err
        assert "trained on the base" not in ran.err


def _changed_in_training(base: Path, out: Path) -> Path:
    """A LoRA beside an embedding that was trained as well, and a head with all that it has, as PEFT saves them."""
    torch.manual_seed(5)
    peft = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
        for end in (peft.get_input_embeddings(), peft.get_output_embeddings()):
            for parameter in end.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(peft, out, save_embedding_layers=True)
    return out


@pytest.mark.parametrize(
    "name", ["gpt2", "tied", "neox", "bert", "bigbird_pegasus", "bloom", "codegen", "cpmant", "ctrl", "inkling_text"]
)
def test_embeddings_are_saved_under_the_names_of_their_architecture(
    run: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """``save_embedding_layers``: PEFT loads what is there, the bias of a head too, and so does every way here."""
    base = models(name) if name in ("gpt2", "tied", "neox") else tiny_folder(name, tmp_path / "base")
    h = TinyRegistry(run, base, tmp_path, monkeypatch)
    h.paths["a"] = _changed_in_training(base, tmp_path / "theirs")
    assert not [p for p in run("inspect", h.paths["a"], "--json").json["problems"] if p["severity"] == "error"]
    run("add", "a", h.paths["a"])
    stacked = h.load()
    assert h.error(stacked, "a", ("a", 1.0)) < 1e-5
    stacked.restore()
    assert oracle.relative(oracle.logits(stacked.model), h.live(), h.live(("a", 1.0))) < 1e-6
    assert "weight 1" in run("compose", "a:0.5", code=4).err
    if name != "bert":  # whose head's bias its files have under another name
        run("export", "a", "--format", "model", "--out", tmp_path / "out")
        found = logits(oracle.load_plain(tmp_path / "out"))
        assert oracle.relative(found, h.live(("a", 1.0)), h.live()) < 1e-5


def test_rows_of_a_pair_that_is_only_said_to_be_tied(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BigBird-Pegasus is configured to tie its head and has no such thing: rows of the embedding are its alone."""
    base = tiny_folder("bigbird_pegasus", tmp_path / "base")
    h = TinyRegistry(run, base, tmp_path, monkeypatch)
    h.add("a", seed=1, target_modules=["q_proj"], trainable_token_indices=[97, 101, 115, 32])
    assert h.error(h.load(), "a", ("a", 1.0)) < 1e-5


@pytest.mark.parametrize("end", ["transformer.wte", "lm_head"])
def test_one_of_a_tied_pair_alone_is_both_as_peft_loads_it(tiny_registry: Any, end: str) -> None:
    h = tiny_registry("gpt2")
    own = random_adapter(h.base, h.folder / "own", seed=1, target_modules=["c_attn"], fan_in_fan_out=True)
    alone = {f"base_model.model.{end}.weight": 0.2 * torch.randn(260, 32)}
    tensors = load_file(own / "adapter_model.safetensors")
    config = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    h.paths["a"] = write(h.folder / "a", tensors | alone, **config)
    h.run("add", "a", h.paths["a"])
    assert h.error(h.load(), "a", ("a", 1.0)) < 1e-5
    stray = {"base_model.model.transformer.ln_f.weight": torch.ones(32)}
    assert "does not explain" in h.run("add", "b", write(h.folder / "b", tensors | stray, **config), code=4).err


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_copy_of_the_base_s_weight_beside_a_lora(tiny_registry: Any, name: str) -> None:
    """PEFT loads it: it is the registered base's, but for rounding, or refused."""
    h = tiny_registry(name)
    own = random_adapter(h.base, h.folder / "own", seed=1, target_modules=["q_proj", "embed_tokens"])
    tensors = load_file(own / "adapter_model.safetensors")
    base = load_file(h.base / "model.safetensors")["model.embed_tokens.weight"]
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    for number, (copy, code) in enumerate(((base, 0), (base.bfloat16(), 0), (base + 0.01, 4), (base[:-1], 4))):
        shutil.rmtree(h.folder / "a", ignore_errors=True)
        path = write(h.folder / "a", tensors | {key: copy}, target_modules=["q_proj", "embed_tokens"])
        ran = h.run("add", f"a{number}", path, code=code)
        assert ("a model.embed_tokens of its own" in ran.err) == bool(code)
