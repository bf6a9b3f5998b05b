"""The GGUF adapter holds exactly the stack, laid out as llama.cpp reads it, or nothing is written.

Names, orientation and the order of rows are written down here by hand, once more; that llama.cpp itself agrees is shown
by ``benchmarks/llama_cpp_client.py``.
"""

from __future__ import annotations

import errno
import json
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import random_adapter
from transformers import Gemma2Config, Gemma3TextConfig, GraniteConfig, SmolLM3Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage, VerificationFailed
from stackctl.core.schema import MethodOptions
from stackctl.engine.base.entry import make_base
from stackctl.engine.export import gguf as gguf_export
from stackctl.engine.export import gguf_layout
from stackctl.engine.export.gguf import export_gguf
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.plan.build import plan_stack
from stackctl.plan.lint import GGUF_ARCHITECTURES
from stackctl.plan.methods import check_method
from stackctl.plan.stack_plan import PlanMember, StackPlan
from stackctl.registry.store import Registry, init_registry

HEADS = {"q_proj": 4, "k_proj": 2}
"""Of the tiny models."""
PERMUTED = ("llama", "tied", "mistral", "granite", "smollm3")
SIZES: dict[str, Any] = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 257,
}  # fmt: skip
MORE = {"granite": GraniteConfig, "smollm3": SmolLM3Config, "gemma2": Gemma2Config, "gemma3": Gemma3TextConfig}
LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
NAMES = {
    "gpt2": {
        "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
    },
    "phi3": {
        "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output", "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
}  # fmt: skip
INSTRUCT = {"gpt2": ["c_attn"], "phi3": ["qkv_proj", "o_proj"]}


def tensor_name(architecture: str, module: str) -> str:
    """``model.layers.1.self_attn.q_proj`` to ``blk.1.attn_q.weight``."""
    ends = {"model.embed_tokens": "token_embd", "transformer.wte": "token_embd", "lm_head": "output"}
    if module in ends:
        return f"{ends[module]}.weight"
    layer, _, rest = module.split(".", 2)[2].partition(".")
    return f"blk.{layer}.{NAMES.get(architecture, LLAMA)[rest]}.weight"


def in_transformers_order(b: np.ndarray, heads: int) -> np.ndarray:
    """Rows of llama.cpp (pairs of neighbours) back to Transformers' (two halves), head by head, one by one."""
    back, size = np.empty_like(b), b.shape[0] // heads
    for head in range(heads):
        for pair in range(size // 2):
            back[head * size + pair] = b[head * size + 2 * pair]
            back[head * size + size // 2 + pair] = b[head * size + 2 * pair + 1]
    return back


@dataclass
class TinyRegistry:
    """A tiny model as a base, and stacks on it."""

    name: str
    base: Path
    folder: Path

    def __post_init__(self) -> None:
        init_registry(self.folder / "registry")
        registry = Registry(self.folder / "registry")
        self.entry = make_base("tiny", str(self.base), None, registry, lambda _: None)

    def adapter(self, name: str, seed: int, weight: float = 1.0, **config: Any) -> PlanMember:
        path = random_adapter(self.base, self.folder / "made" / name, seed=seed, **config)
        return PlanMember(f"{name}@1", weight, read_checkpoint(path), name, 1)

    def plan(self, *members: PlanMember, **kind: Any) -> StackPlan:
        return plan_stack(self.entry, members, **kind)

    def export(self, plan: StackPlan, out: str = "out", **options: Any) -> dict[str, Any]:
        return export_gguf(plan, self.base, self.folder / out, **options)

    def read(self, out: str = "out") -> gguf.GGUFReader:
        found = list((self.folder / out).iterdir())
        assert len([path for path in found if path.suffix == ".gguf"]) == 1
        return gguf.GGUFReader(next(path for path in found if path.suffix == ".gguf"))

    def deltas(self, out: str = "out") -> dict[str, np.ndarray]:
        """Every tensor's delta as llama.cpp applies it: alpha / rank · B @ A, in float64, rows put back in order."""
        reader = self.read(out)
        alpha = float(key(reader, "adapter.lora.alpha"))
        tensors = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
        found = {}
        for name in tensors:
            if name.endswith(".lora_b"):
                continue
            a, b = tensors[name], tensors[name.removesuffix("a") + "b"]
            weight = name.removesuffix(".lora_a")
            if weight == "token_embd.weight":  # looked up by token, then multiplied with B: (vocabulary, dimension)
                found[weight] = alpha / b.shape[1] * a @ b.T
                continue
            for part, heads in (("attn_q.", 4), ("attn_k.", 2)):
                if part in weight and self.name in PERMUTED:
                    b = in_transformers_order(b, heads)
            found[weight] = alpha / b.shape[1] * b @ a
        return found


def key(reader: gguf.GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


@pytest.fixture
def tiny_registry(models: Any, tmp_path: Path) -> Callable[..., TinyRegistry]:
    def make(name: str = "llama") -> TinyRegistry:
        if name not in MORE:
            return TinyRegistry(name, models(name), tmp_path)
        torch.manual_seed(0)
        config = MORE[name](**SIZES, **({"head_dim": 8} if "gemma" in name else {}))
        base = tmp_path / "base"
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).save_pretrained(base)
        for path in models("llama").glob("*token*"):
            shutil.copyfile(path, base / path.name)
        return TinyRegistry(name, base, tmp_path)

    return make


def exact(*members: PlanMember, architecture: str) -> dict[str, torch.Tensor]:
    total = oracle.added(*(oracle.deltas(m.checkpoint.path, m.weight) for m in members))
    return {tensor_name(architecture, name.removeprefix("base_model.model.")): d for name, d in total.items()}


def error(found: dict[str, np.ndarray], wanted: dict[str, torch.Tensor]) -> float:
    assert set(found) == set(wanted)
    return max(
        float(np.linalg.norm(found[name] - delta.numpy()) / np.linalg.norm(delta.numpy()))
        for name, delta in wanted.items()
    )


@pytest.mark.parametrize("name", ["llama", "tied", "mistral", "qwen2", "qwen3", "gemma", "phi3", "gpt2", *MORE])
def test_every_value_is_the_stacks(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    style = h.adapter("style", 1, r=3, lora_alpha=7)
    some = INSTRUCT.get(name, ["q_proj", "k_proj", "down_proj"])
    instruct = h.adapter("instruct", 2, weight=-0.7, r=2, use_rslora=True, target_modules=some)
    report = h.export(h.plan(style, instruct))
    assert report == {"rank": 5, "max_relative_error": 0.0, "exact": True}
    assert error(h.deltas(), exact(style, instruct, architecture=name)) < 1e-6
    reader = h.read()
    assert key(reader, "general.architecture") == GGUF_ARCHITECTURES[h.entry.architecture].name
    assert (key(reader, "general.type"), key(reader, "adapter.type")) == ("adapter", "lora")
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}


def test_the_permutation_is_there_and_only_for_q_and_k(h: Any) -> None:
    style = h.adapter("style", 1)
    h.export(h.plan(style))
    tensors = {tensor.name: tensor.data for tensor in h.read().tensors}
    saved = load_file(style.checkpoint.weights_path)
    for module, part in LLAMA.items():
        factor = saved[f"base_model.model.model.layers.0.{module}.lora_B.weight"].numpy() * 2**0.5
        written = tensors[f"blk.0.{part}.weight.lora_b"]
        heads = HEADS.get(module.rpartition(".")[2])
        assert np.allclose(written, factor) == (heads is None), module
        if heads:
            assert np.allclose(in_transformers_order(written, heads), factor)


def test_unlike_ranks_are_padded_so_that_one_alpha_is_right_for_all(h: Any) -> None:
    style = h.adapter("style", 1, r=2, target_modules=["q_proj"])
    instruct = h.adapter("instruct", 2, r=9, lora_alpha=3, target_modules=["v_proj", "q_proj"])
    third = h.adapter("third", 3, weight=0.3, r=1, target_modules=["up_proj"])
    assert h.export(h.plan(style, instruct, third))["rank"] == 11
    reader = h.read()
    assert key(reader, "adapter.lora.alpha") == 11
    assert {tensor.data.shape[1] for tensor in reader.tensors if tensor.name.endswith("lora_b")} == {11}
    assert error(h.deltas(), exact(style, instruct, third, architecture="llama")) < 1e-6


def test_embedding_and_output_of_an_untied_model(h: Any) -> None:
    style = h.adapter("style", 1, r=3, target_modules=["embed_tokens", "lm_head"])
    instruct = h.adapter("instruct", 2, weight=0.5, r=2, target_modules=["embed_tokens", "q_proj"])
    h.export(h.plan(style, instruct))
    shapes = {tensor.name: tensor.data.shape for tensor in h.read().tensors}
    assert shapes["token_embd.weight.lora_a"] == (260, 5)
    assert shapes["token_embd.weight.lora_b"] == (32, 5)
    assert shapes["output.weight.lora_a"] == (5, 32)
    assert shapes["output.weight.lora_b"] == (260, 5)
    parts = []
    for path, weight, alpha_by_rank in ((style, 1.0, 8 / 3), (instruct, 0.5, 8 / 2)):
        saved = load_file(path.checkpoint.weights_path)
        a, b = (saved[f"base_model.model.model.embed_tokens.lora_embedding_{x}"].double() for x in "AB")
        parts.append(weight * alpha_by_rank * (b @ a).T)
    wanted = exact(style, instruct, architecture="llama") | {"token_embd.weight": parts[0] + parts[1]}
    assert error(h.deltas(), wanted) < 1e-6


def test_in_float16_the_rounding_is_measured(h: Any) -> None:
    style, instruct = h.adapter("style", 1), h.adapter("instruct", 2, target_modules=["q_proj", "o_proj"])
    report = h.export(h.plan(style, instruct), dtype="float16")
    assert not report["exact"]
    assert {tensor.tensor_type for tensor in h.read().tensors} == {gguf.GGMLQuantizationType.F16}
    measured = error(h.deltas(), exact(style, instruct, architecture="llama"))
    assert report["max_relative_error"] == pytest.approx(measured, rel=1e-3)
    assert 1e-5 < measured < 1e-3


@pytest.mark.parametrize("rank", [4, "auto"])
def test_other_methods_are_written_at_their_own_rank(h: Any, rank: int | str) -> None:
    members = h.adapter("style", 1, r=6), h.adapter("instruct", 2, r=6, target_modules=["q_proj", "v_proj"])
    options = check_method("svd", MethodOptions(rank=rank, tolerance=0.3 if rank == "auto" else None))
    report = h.export(h.plan(*members, method="svd", options=options))
    assert not report["exact"]
    assert report["rank"] < 12
    assert key(h.read(), "adapter.lora.alpha") == report["rank"]
    measured = error(h.deltas(), exact(*members, architecture="llama"))
    assert report["max_relative_error"] == pytest.approx(measured, rel=1e-3)


def test_only_the_configuration_of_the_base_is_read(h: Any, tmp_path: Path) -> None:
    plan = h.plan(h.adapter("style", 1))
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copyfile(h.base / "config.json", bare / "config.json")
    export_gguf(plan, bare, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["out.gguf"]


# -- the base in GGUF, and the Modelfile -----------------------------------------------------------------------------


def write_base(path: Path, plan: StackPlan, architecture: str = "llama", heads: int = 4, **shapes: Any) -> Path:
    """A GGUF with the tensors that a plan stands on, and no more."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    for module in plan.modules.values():
        name = tensor_name("llama", module.name)
        shape = shapes.get(name.split(".")[2], module.shape)
        if shape:
            writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_modelfile_names_base_and_adapter(h: Any, tmp_path: Path) -> None:
    plan = h.plan(h.adapter("style", 1))
    base = write_base(tmp_path / "a base.gguf", plan)
    h.export(plan, "my adapter.gguf", modelfile=True, base_gguf=base)
    out = tmp_path / "my adapter.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "my-adapter.gguf"]
    lines = (out / "Modelfile").read_text().splitlines()
    assert lines[1:] == [f"FROM {base.resolve()}", "ADAPTER ./my-adapter.gguf"]
    assert lines[0].startswith("# style@1 on tiny")
    h.export(plan, "second", modelfile=True)
    assert f"FROM {h.base.resolve()}\n" in (tmp_path / "second" / "Modelfile").read_text()


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"architecture": "qwen2"}, "architecture qwen2"),
        ({"heads": 8}, "8 and 2 attention heads"),
        ({"attn_k": None}, "has no blk.0.attn_k.weight"),
        ({"ffn_up": (16, 32)}, "blk.0.ffn_up.weight of shape [16, 32]"),
    ],
)
def test_a_base_that_the_adapter_would_not_fit_is_refused(h: Any, tmp_path: Path, kind: Any, said: str) -> None:
    plan = h.plan(h.adapter("style", 1))
    with pytest.raises(Incompatible) as caught:
        h.export(plan, base_gguf=write_base(tmp_path / "base.gguf", plan, **kind))
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_no_gguf_or_not_there(h: Any, tmp_path: Path) -> None:
    plan = h.plan(h.adapter("style", 1))
    (tmp_path / "text.gguf").write_text("this is no GGUF file, whatever it is called")
    with pytest.raises(Incompatible):
        h.export(plan, base_gguf=tmp_path / "text.gguf")
    with pytest.raises(NotFound):
        h.export(plan, base_gguf=tmp_path / "missing.gguf")


# -- refused, before anything is written -------------------------------------------------------------------------------


def refused(
    h: TinyRegistry, plan: StackPlan, *said: str, kind: type[StackctlError] = Incompatible, **options: Any
) -> None:
    before = sorted(h.folder.rglob("*"))
    with pytest.raises(kind) as caught:
        h.export(plan, **options)
    assert all(text in caught.value.message for text in said), caught.value.message
    assert sorted(h.folder.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize(("name", "targets"), [("neox", "all-linear"), ("mixtral", ["q_proj"])])
def test_architectures_that_are_not_known_to_be_right(tiny_registry: Any, name: str, targets: Any) -> None:
    h = tiny_registry(name)
    refused(h, h.plan(h.adapter("style", 1, target_modules=targets)), h.entry.architecture)


@pytest.mark.parametrize(
    ("name", "targets", "said"),
    [
        ("tied", ["embed_tokens", "q_proj"], "model.embed_tokens"),
        ("tied", ["lm_head", "q_proj"], "lm_head"),
        ("gemma", ["embed_tokens"], "model.embed_tokens"),
        ("gpt2", ["wpe", "c_attn"], "transformer.wpe"),
    ],
)
def test_embeddings_that_llama_cpp_cannot_adapt(tiny_registry: Any, name: str, targets: list[str], said: str) -> None:
    h = tiny_registry(name)
    refused(h, h.plan(h.adapter("style", 1, target_modules=targets)), "style@1", said)


def test_what_no_lora_holds_and_what_no_dtype_is(tiny_registry: Any) -> None:
    h = tiny_registry("qwen2")
    whole = h.adapter("whole", 1, target_modules=["q_proj"], modules_to_save=["norm"])
    biased = h.adapter("biased", 2, target_modules=["v_proj"], bias="lora_only")
    plain = h.adapter("plain", 3)
    refused(h, h.plan(whole), "whole@1", "whole modules")
    refused(h, h.plan(biased), "biased@1", "biases")
    refused(h, h.plan(plain), "bfloat16", dtype="bfloat16")
    refused(h, h.plan(replace(plain, weight=0.0)), "adds nothing")
    refused(h, h.plan(plain, plain), "twice")


def test_a_configuration_that_does_not_say_the_heads(h: Any, tmp_path: Path) -> None:
    plan = h.plan(h.adapter("style", 1))
    for change in ({"num_attention_heads": None}, {"num_attention_heads": 5}):
        bare = tmp_path / "bare"
        bare.mkdir(exist_ok=True)
        (bare / "config.json").write_text(json.dumps(json.loads((h.base / "config.json").read_text()) | change))
        with pytest.raises(Incompatible):
            export_gguf(plan, bare, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# -- failing, with nothing left ---------------------------------------------------------------------------------------


def test_values_that_do_not_fit_float16(h: Any) -> None:
    style = h.adapter("style", 1, scale=1e6)
    refused(h, h.plan(style), "blk.0.", "does not fit float16", kind=VerificationFailed, dtype="float16")
    assert h.export(h.plan(style))["exact"]


def test_values_that_are_no_numbers(h: Any) -> None:
    style = h.adapter("style", 1)
    tensors = load_file(style.checkpoint.weights_path)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, style.checkpoint.weights_path, {"format": "pt"})
    refused(h, h.plan(style), "style@1", kind=VerificationFailed)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("fault", ["a value", "the order of rows", "the padding", "alpha", "a name"])
def test_what_is_read_back_is_compared(h: Any, monkeypatch: Any, fault: str, dtype: str) -> None:
    """A test of the check: each of these would make llama.cpp compute something else without a word."""
    plan = h.plan(
        h.adapter("style", 1, r=2, target_modules=["q_proj"]), h.adapter("more", 2, target_modules=["v_proj"])
    )
    if fault == "the order of rows":
        monkeypatch.setattr(gguf_layout, "_rows", lambda count, heads: torch.arange(count))
    elif fault == "alpha":
        monkeypatch.setattr(gguf.GGUFWriter, "add_float32", lambda self, name, value: self.add_float64(name, value + 1))
    elif fault == "a name":
        add = gguf.GGUFWriter.add_tensor_info
        monkeypatch.setattr(
            gguf.GGUFWriter,
            "add_tensor_info",
            lambda self, name, *rest: add(self, name.replace("attn_v", "ffn_up"), *rest),
        )
    else:
        write = gguf_export._write_values

        def spoil(writer: Any, tensor: np.ndarray) -> None:
            tensor = tensor.copy()
            if tensor.shape == (4, 32):
                tensor[0 if fault == "a value" else 3, 5] += 0.25
            write(writer, tensor)

        monkeypatch.setattr(gguf_export, "_write_values", spoil)
    refused(h, plan, "not what was planned", kind=VerificationFailed, dtype=dtype)


@pytest.mark.parametrize("missing", [1, 100, 5000])
def test_a_file_that_cannot_be_written_to_its_end_is_told_by_the_system(h: Any, tmp_path: Path, missing: int) -> None:
    plan = h.plan(h.adapter("style", 1))
    export_gguf(plan, h.base, tmp_path / "whole")
    [whole] = (tmp_path / "whole").iterdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size - missing, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            export_gguf(plan, h.base, tmp_path / "cut")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert not [path for path in tmp_path.iterdir() if "cut" in path.name]


def test_a_folder_that_is_taken_stays_as_it_is(h: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    refused(h, h.plan(h.adapter("style", 1)), "already exists", kind=Usage)
    assert (tmp_path / "out" / "mine").read_text() == "mine"
