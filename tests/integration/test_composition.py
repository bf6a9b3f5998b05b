"""A stack is the exact sum of its deltas: logits against raw PEFT with all members live, in float64."""

from __future__ import annotations

import functools
from typing import Any

import oracle
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import random_adapter

from stackctl.core.errors import StackctlError

TOLERANCE = 1e-5
"""Of the stack's effect, in float32."""
ARCHITECTURES = ["llama", "tied", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "phi3", "neox", "mixtral"]
SOME = {  # a few modules of each, so that two members overlap in part
    "gpt2": ["c_attn", "mlp.c_proj"],
    "phi3": ["qkv_proj", "down_proj"],
    "neox": ["query_key_value", "dense_4h_to_h"],
    "mixtral": ["q_proj", "o_proj"],
}
HEADS = {"neox": ("embed_in", "embed_out"), "gpt2": ("wte", "lm_head")}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_stack_is_the_sum_of_its_deltas(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    everything = "all-linear" if name != "mixtral" else ["q_proj", "k_proj", "v_proj", "o_proj"]
    h.add("style", seed=1, target_modules=everything)
    h.add(
        "instruct", seed=2, r=3, lora_alpha=5, use_rslora=True, target_modules=SOME.get(name, ["q_proj", "down_proj"])
    )
    stacked = h.load()
    first = h.logits(stacked, "style+instruct")
    errors = {
        "sum": h.error(stacked, "style+instruct", ("style", 1), ("instruct", 1)),
        "weights": h.error(stacked, "style:0.5+instruct:-0.7", ("style", 0.5), ("instruct", -0.7)),
        "zero": h.error(stacked, "style:0+instruct", ("instruct", 1)),
        "one": h.error(stacked, "style", ("style", 1)),
    }
    assert max(errors.values()) < TOLERANCE, errors
    assert torch.equal(h.logits(stacked, "style+instruct"), first), "A, B, A gives A, bit for bit"
    stacked.restore()
    assert torch.equal(oracle.logits(stacked.model), oracle.logits(oracle.load_plain(h.base)))


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "disjoint modules": ({"target_modules": ["q_proj", "o_proj"]}, {"target_modules": ["v_proj", "gate_proj"]}),
    "unlike ranks": ({"r": 1, "lora_alpha": 3}, {"r": 16, "lora_alpha": 4}),
    "rank pattern": ({"r": 2, "rank_pattern": {"q_proj": 5, "mlp.up_proj": 1}}, {"target_modules": ["q_proj"]}),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 1, r"layers\.1\..*v_proj": 40}}, {"lora_alpha": 3}),
    "both patterns with rsLoRA": (
        {"use_rslora": True, "rank_pattern": {"k_proj": 6}, "alpha_pattern": {"k_proj": 3}},
        {"use_rslora": True, "r": 7},
    ),
    "some layers": (
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0]},
    ),
    "a regular expression": ({"target_modules": r".*\.0\..*(q|v)_proj"}, {"target_modules": r".*down_proj"}),
    "dropout recorded": ({"lora_dropout": 0.5}, {"lora_dropout": 0.9}),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, {"target_modules": ["embed_tokens"], "r": 2}),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["lm_head"], "use_rslora": True}),
    "embedding in one, head in the other": ({"target_modules": ["embed_tokens"]}, {"target_modules": ["lm_head"]}),
    "a saved norm": ({"modules_to_save": ["norm"]}, {}),
    "a saved head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, {"target_modules": ["v_proj"]}),
    "saved embeddings": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, {"target_modules": ["v_proj", "q_proj"]}
    ),
}  # fmt: skip


ON_BASES = [("llama", case) for case in CASES] + [("tied", case) for case in CASES if "embed" in case or "head" in case]


@pytest.mark.parametrize(("base", "case"), ON_BASES)
def test_every_kind_of_plain_lora(tiny_registry: Any, base: str, case: str) -> None:
    h = tiny_registry(base)
    style, instruct = CASES[case]
    h.add("style", seed=3, **style)
    h.add("instruct", seed=4, **instruct)
    stacked = h.load()
    before = h.logits(stacked, "instruct")
    weight = 1 if style.get("modules_to_save") else 0.3
    error = h.error(stacked, f"style:{weight}+instruct:1.5", ("style", weight), ("instruct", 1.5))
    swapped = h.error(stacked, f"instruct:1.5+style:{weight}", ("style", weight), ("instruct", 1.5))
    assert max(error, swapped) < TOLERANCE
    assert torch.equal(h.logits(stacked, "instruct"), before)


@pytest.mark.parametrize("saved", ["norm", "lm_head", "embed_tokens"])
@pytest.mark.parametrize("base", ["llama", "tied"])
def test_switching_back_to_a_saved_module_gives_the_same_bits(tiny_registry: Any, base: str, saved: str) -> None:
    """A, B, A where A brings a whole module: B may be without, bring another copy of it, be live, or be refused."""
    h = tiny_registry(base)
    h.add("style", seed=3, target_modules=["q_proj"], modules_to_save=[saved])
    h.add("other", seed=4, target_modules=["v_proj"], modules_to_save=[saved])
    h.add("tone", seed=5, target_modules=["q_proj", "down_proj"])
    stacked = h.load()

    def live_tone() -> torch.Tensor:
        stacked.use(h.plan("tone"), live=True)
        return oracle.logits(stacked.model)

    def refused() -> torch.Tensor:
        with pytest.raises(StackctlError, match="whole modules"):
            stacked.use(h.plan("other"), live=True)
        return oracle.logits(stacked.model)

    bare, first = h.logits(stacked, "base"), h.logits(stacked, "style+tone")
    assert oracle.relative(first, h.live(("style", 1), ("tone", 1)), bare) < TOLERANCE
    betweens = [functools.partial(h.logits, stacked, text) for text in ("base", "tone", "other", "other+tone")]
    for between in (*betweens, live_tone, refused):
        assert not torch.equal(between(), first)
        assert torch.equal(h.logits(stacked, "style+tone"), first), between
    assert torch.equal(h.logits(stacked, "base"), bare)


@pytest.mark.parametrize(("name", "module"), [("gpt2", "wte"), ("neox", "embed_in"), ("llama", "lm_head")])
def test_a_lora_on_what_another_member_brings_whole(tiny_registry: Any, name: str, module: str) -> None:
    """The whole module and the change, as an exported model has it; PEFT does it one after the other."""
    h = tiny_registry(name)
    targets = {"gpt2": "c_attn", "neox": "query_key_value", "llama": "q_proj"}[name]
    whole = h.add("whole", seed=3, target_modules=[targets], modules_to_save=[module])
    change = h.add("change", seed=4, target_modules=[targets, module])
    model = PeftModel.from_pretrained(oracle.load_plain(h.base), whole).merge_and_unload()
    tensors = load_file(change / "adapter_model.safetensors")  # without the base's own, which PEFT would load as well
    save_file({n: t for n, t in tensors.items() if "base_layer" not in n}, change / "adapter_model.safetensors")
    wanted = oracle.logits(PeftModel.from_pretrained(model, change).double().eval())
    stacked, bare = h.load(), oracle.base_logits(h.base)
    for expression in ("whole+change", "change+whole"):
        assert oracle.relative(h.logits(stacked, expression), wanted, bare) < TOLERANCE
    h.run("export", "whole+change", "--format", "model", "--out", h.folder / "out")
    assert oracle.relative(oracle.logits(oracle.load_plain(h.folder / "out")), wanted, bare) < TOLERANCE
    assert torch.equal(h.logits(stacked, "base"), h.logits(h.load(), "base"))
    h.run("add", "later", whole, "--on", "change")
    assert "whether it holds that change" in h.run("compose", "change+later", code=4).err


@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma", "qwen3"])
def test_embeddings_and_heads_of_other_models(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    embedding, head = HEADS.get(name, ("embed_tokens", "lm_head"))
    h.add("style", seed=5, target_modules=[embedding])
    h.add("instruct", seed=6, target_modules=[head, embedding], r=2)
    stacked = h.load()
    assert h.error(stacked, "style+instruct", ("style", 1), ("instruct", 1)) < TOLERANCE
    assert h.error(stacked, "style", ("style", 1)) < TOLERANCE


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("name", ["qwen2", "gpt2"])
def test_trained_biases_in_one_member(tiny_registry: Any, name: str, bias: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=7, bias=bias, target_modules=["c_attn"] if name == "gpt2" else ["q_proj", "v_proj"])
    assert [key for key in oracle.factors_of(h.paths["style"]) if key.endswith(".bias")]
    h.add("instruct", seed=9)
    stacked = h.load()
    before = h.logits(stacked, "base")
    assert h.error(stacked, "style+instruct", ("style", 1), ("instruct", 1)) < TOLERANCE
    assert torch.equal(h.logits(stacked, "base"), before)
    refused = h.run("generate", "style:0.5+instruct", "-p", "x", code=4)
    assert "style@1" in refused.err, "a bias has no weight"
    for command in ("export", "style", "--out", h.folder / "out"), ("generate", "style", "--live", "-p", "x"):
        assert "style@1 carries trained biases" in h.run(*command, code=4).err


def test_pefts_own_sums_are_not_sums(h: Any) -> None:
    """The trap: "linear" adds A's and B's apart; "cat" takes one scaling for all; "svd" cuts to the larger rank."""
    h.add("style", seed=1, use_rslora=True)
    h.add("instruct", seed=2)
    truth, base = h.live(("style", 1), ("instruct", 1)), h.live()
    wrong = {}
    for kind in ("linear", "cat", "svd"):
        model = PeftModel.from_pretrained(oracle.load_plain(h.base), h.paths["style"], adapter_name="style")
        model.load_adapter(h.paths["instruct"], adapter_name="instruct")
        model.add_weighted_adapter(["style", "instruct"], [1.0, 1.0], "both", combination_type=kind)
        model.set_adapter("both")
        wrong[kind] = oracle.relative(oracle.logits(model.double()), truth, base)
    assert min(wrong.values()) > 0.05, wrong
    assert h.error(h.load(), "style+instruct", ("style", 1), ("instruct", 1)) < TOLERANCE


def test_in_bfloat16_a_stack_is_rounded_once(tiny_registry: Any) -> None:
    """The trap: folding one adapter after another rounds twice, and loses more of a small delta."""
    h = tiny_registry("llama", dtype=torch.bfloat16)
    h.add("style", seed=1, scale=0.05)
    h.add("instruct", seed=2, scale=0.02)
    stacked = h.load("bfloat16")
    weights = {name: p.detach().double() for name, p in stacked.model.named_parameters()}
    stacked.use(h.plan("style+instruct"))
    gained = {name: p.detach().double() - weights[name] for name, p in stacked.model.named_parameters()}
    style, instruct = oracle.deltas(h.paths["style"]), oracle.deltas(h.paths["instruct"])
    exact = {name.removeprefix("base_model.model.") + ".weight": d for name, d in oracle.added(style, instruct).items()}

    def lost(found: dict[str, torch.Tensor]) -> float:
        gap = sum(float((found[name] - delta).square().sum()) for name, delta in exact.items())
        return float((gap / sum(float(delta.square().sum()) for delta in exact.values())) ** 0.5)

    twice = {}
    for name in exact:
        key = "base_model.model." + name.removesuffix(".weight")
        once = (weights[name] + style[key]).bfloat16().double()
        twice[name] = (once + instruct[key]).bfloat16().double() - weights[name]
    assert lost(gained) < 0.9 * lost(twice)
    assert stacked.rounding_error == pytest.approx(lost(gained), rel=1e-3), "what rounding costs is measured"
    stacked.restore()
    assert all(torch.equal(p.double(), weights[name]) for name, p in stacked.model.named_parameters())


def test_a_member_with_numbers_that_are_none_is_5(tiny_registry: Any) -> None:
    from safetensors.torch import load_file, save_file

    h = tiny_registry("llama")
    path = random_adapter(h.base, h.folder / "sick", seed=1)
    tensors = load_file(path / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    if h.run("add", "sick", path, code=None).code == 0:
        h.run("generate", "sick", "-p", "x", code=5)
        with pytest.raises(StackctlError) as caught:
            h.load().use(h.plan("sick"))
        assert caught.value.exit_code == 5
