"""Experts of a mixture, whose weights are one parameter: what PEFT makes of a LoRA on them is the truth."""

import json
from pathlib import Path

import architectures
import oracle
import pytest
import torch
from peft import PeftModel
from peft.utils import transformers_weight_conversion
from safetensors.torch import load_file
from tiny import random_adapter
from tiny_registry import CHAT

from stackctl.engine.base.module_shapes import converted_names
from stackctl.lora.target_parameters import CONVERTED_NAMES
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression

KINDS = ["mixtral", "gpt_oss", "llama4_text"]
"""Stored (experts, out, in), where PEFT converts names; stored (experts, in, out); and in an order of its own."""


@pytest.fixture(params=KINDS)
def h(request, tmp_path_factory, run, tmp_path, monkeypatch):
    from tiny_registry import TinyRegistry

    base = architectures.tiny_folder(request.param, tmp_path / "tiny")
    return TinyRegistry(run, base, tmp_path, monkeypatch)


def close(found, wanted, base, tolerance=2e-5):
    assert oracle.relative(found.double(), wanted, base) <= tolerance


def members(h):
    """Two random adapters on experts and attention; with other ranks and scalings."""
    experts = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    h.add("one", seed=1, target_modules=["q_proj", "o_proj"], **experts, r=3, lora_alpha=5)
    h.add("two", seed=2, target_modules=["q_proj"], **experts, r=2, use_rslora=True)
    return [(h.paths["one"], 1.0), (h.paths["two"], -0.5)]


def test_stacks_are_the_sum_of_their_deltas(h, tmp_path):
    """Folded, kept live, exported as an adapter and as a model: each is all adapters live in plain PEFT."""
    live = oracle.live(h.base, *members(h), dtype=torch.float32)
    wanted, bare = oracle.logits(live), oracle.logits(oracle.load_plain(h.base))
    for kept in ((), ("--live",)):
        h.run("generate", "one+two:-0.5", "-p", "x", "--raw", "--max-new-tokens", 2, *kept)
    exported = h.run("export", "one+two:-0.5", "--format", "peft", "--out", tmp_path / "peft", "--json").json
    assert exported["exact"] and exported["rank"] == 5
    again = PeftModel.from_pretrained(oracle.load_plain(h.base), tmp_path / "peft")
    close(oracle.logits(again), wanted, bare)


def test_folding_and_live_are_what_peft_makes(h):
    from stackctl.engine.models import load_base
    from stackctl.registry.store import Registry

    live = oracle.live(h.base, *members(h), dtype=torch.float32)
    wanted, bare = oracle.logits(live), oracle.logits(oracle.load_plain(h.base))
    registry = Registry(Path("registry").resolve())
    stack = resolve_expression(registry, "one+two:-0.5")
    plan = read_plan(registry, stack)
    for kept_live in (True, False):
        model = load_base(stack.base, registry, dtype="float32", device="cpu")
        before = oracle.logits(model.model)
        model.use(plan, live=kept_live)
        close(oracle.logits(model.model), wanted, bare)
        model.restore()
        assert torch.equal(oracle.logits(model.model), before)


@pytest.mark.parametrize("method", [["svd", "--rank", "2"], ["ties", "--density", "0.5"]])
def test_methods_work_on_each_expert(h, method, tmp_path):
    from stackctl.engine import algebra
    from stackctl.engine.merging import exact_delta, module_delta
    from stackctl.engine.tensors import MemberTensors
    from stackctl.registry.store import Registry

    members(h)
    h.run("compose", "one+two", "--method", *method, "--name", "m")
    registry = Registry(Path("registry").resolve())
    plan = read_plan(registry, resolve_expression(registry, "m"))
    module = next(module for module in plan.modules.values() if module.is_experts)
    with torch.no_grad(), MemberTensors(plan) as tensors:
        factors = tensors.factors(module)
        made, exact = module_delta(plan, module, factors), exact_delta(module, factors)
    parts = []
    for path in (h.paths["one"], h.paths["two"]):
        config = json.loads((path / "adapter_config.json").read_text())
        rank = config["r"]
        scaling = config["lora_alpha"] / (rank**0.5 if config["use_rslora"] else rank)
        tensors = load_file(path / "adapter_model.safetensors")
        a = next(t for n, t in tensors.items() if tuple(t.shape) == (rank * module.experts, module.shape[1]))
        name = next(n for n, t in tensors.items() if t is a).replace("lora_A", "lora_B")
        b = tensors[name]
        a, b = a.double().view(module.experts, rank, -1), b.double().view(b.shape[0], rank, module.experts)
        parts.append(torch.einsum("ore,eri->eoi", b, a) * scaling)
    wanted = torch.stack(parts).sum(0)
    assert exact.shape == (module.experts, *module.shape)
    if len({m.shape for m in plan.modules.values() if m.is_experts}) > 1:  # else the tensor found may be another's
        assert torch.allclose(exact.double(), wanted, atol=1e-5)
    if method[0] == "svd":
        for expert in range(module.experts):
            u, s, v = torch.linalg.svd(exact[expert].double())
            best = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
            assert torch.allclose(made[expert].double(), best, atol=1e-4)
    pairs = algebra.split_experts(factors, module.experts)
    back = algebra.join_experts([own[0][:2] for own in pairs])
    assert torch.equal(back[0], factors[0][0]) and torch.equal(back[1], factors[0][1])


def test_training_on_experts_is_what_peft_does(h):
    """The default adapter stands on the experts; trained on a live stack it is what it is on a folded one."""
    told = h.train("style", "--max-steps", 2, records=CHAT[:2])
    assert told["steps"] == 2
    tensors = load_file(h.weights("style") / "adapter_model.safetensors")
    assert any(".experts." in name for name in tensors)
    folded = h.train("a", "--max-steps", 2, "--frozen", "fold", on="style", records=CHAT[:2])
    live = h.train("b", "--max-steps", 2, "--frozen", "live", on="style", records=CHAT[:2])
    assert live["frozen"] == "live" and folded["frozen"] == "fold"
    assert abs(folded["loss"] - live["loss"]) <= 1e-5 * folded["loss"]
    first, second = (load_file(h.weights(name) / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=2e-4), name


def test_a_live_stack_on_experts_that_the_new_adapter_leaves_out_is_refused_before_training(h):
    h.train("style", "--max-steps", 1, records=CHAT[:2])
    names = ["--target-modules", "q_proj,experts.down_proj", "--frozen", "live", "--max-steps", 1, "--batch-size", 2]
    train = ("train", "n", "--on", "style", "--data", h.data(CHAT[:2]), *names, "--json")
    for command in (train, (*train, "--dry-run")):
        error = h.run(*command, code=4).json["error"]
        assert "gate_up_proj" in error["message"] and "--frozen fold" in error["hint"]


def test_auto_folds_a_stack_that_cannot_stay_live_beside_the_new_adapter(h):
    """In bfloat16 folding loses more than it may, and PEFT keeps only adapters of the same parameters live together."""
    h.train("style", "--max-steps", 1, records=CHAT[:2])
    names = ["--target-modules", "q_proj,experts.down_proj", "--max-steps", 1, "--batch-size", 2, "--dtype", "bfloat16"]
    ran = h.run("train", "n", "--on", "style", "--data", h.data(CHAT[:2]), *names, "--json")
    assert ran.json["frozen"] == "fold"
    assert "cannot be kept live" in ran.err and "gate_up_proj" in ran.err
    whole = h.run("train", "m", "--on", "style", "--data", h.data(CHAT[:2]), *names[2:], "--json")
    assert whole.json["frozen"] == "live"


def test_a_stack_on_the_router_is_folded_or_refused_beside_an_adapter_on_experts(tiny_registry):
    """PEFT's own all-linear takes the router's matrix, as a parameter: what is live beside experts has to name it."""
    h = tiny_registry("mixtral")
    h.add("raw", seed=1)
    assert any(name.endswith(".gate") for name in h.plan("raw").modules)
    steps = ["--max-steps", 1, "--batch-size", 2]
    error = h.train("n", *steps, "--frozen", "live", on="raw", records=CHAT[:2], code=4)["error"]
    assert "mlp.gate" in error["message"] and "--frozen fold" in error["hint"]
    assert h.train("m", *steps, "--dtype", "bfloat16", on="raw", records=CHAT[:2])["frozen"] == "fold"


def test_a_regular_expression_of_layers_means_those_layers(h):
    """PEFT makes last names of it in some mixtures, and adapts every layer."""
    h.train("style", "--target-modules", r".*\.1\.self_attn\.(q|o)_proj", "--max-steps", 1, records=CHAT[:2])
    names = {name.partition(".lora_")[0] for name in load_file(h.weights("style") / "adapter_model.safetensors")}
    assert sorted(name.partition("layers.")[2] for name in names) == ["1.self_attn.o_proj", "1.self_attn.q_proj"]
    h.run("add", "again", h.weights("style"))
    live = PeftModel.from_pretrained(oracle.load_plain(h.base), h.weights("style"))
    assert sum("lora_A" in name for name, _ in live.named_parameters()) == 2


def test_dropout_leaves_the_experts_out_and_says_so(h):
    given = ["--data", h.data(CHAT[:2]), "--dropout", 0.1, "--dry-run", "--json"]
    told = h.run("train", "n", "--base", "tiny", *given).json
    assert told["adapts"] and not any("experts." in name for name in told["adapts"])
    assert any("experts." in name and "dropout" in why for name, why in told["leaves_out"].items())


def test_pefts_list_of_names_is_the_one_here():
    found = {kind: tuple(sorted(m)) for kind, m in transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.items()}
    assert found == CONVERTED_NAMES


def test_pefts_choice_of_model_types_is_the_one_here():
    patterns = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN
    for kind in ("mixtral", "qwen3_moe", "deepseek_v3", "qwen2_moe", "gpt_oss", "llama"):
        config = architectures.tiny_config(kind)
        with torch.device("meta"):
            model = architectures.model_class(config)(config)
        wanted = CONVERTED_NAMES.get(patterns.get(kind, ""), ())
        assert converted_names(model) == list(wanted)


def test_an_adapter_of_pefts_all_linear_is_taken_whole(h, tmp_path):
    """It stands on the router too, where PEFT has a conversion of names."""
    if "llama4" in (h.base / "config.json").read_text():
        pytest.skip("plain PEFT breaks this router")
    path = random_adapter(h.base, tmp_path / "all", seed=3, scale=0.1)
    h.run("add", "all", path)
    live = oracle.live(h.base, (path, 1.0), dtype=torch.float32)
    wanted, bare = oracle.logits(live), oracle.logits(oracle.load_plain(h.base))
    h.run("export", "all", "--format", "peft", "--out", tmp_path / "peft")
    again = PeftModel.from_pretrained(oracle.load_plain(h.base), tmp_path / "peft")
    close(oracle.logits(again), wanted, bare)
