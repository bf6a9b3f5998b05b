"""What vLLM, llama.cpp and Ollama would reject or limit is known from the plan alone, with the member's name."""

import msgspec
import pytest
from checkpoints import attention, base_modules, lora_config, lora_tensors, make_base, member, memory_checkpoint

from stackctl.core.errors import Usage
from stackctl.core.schema import MethodOptions, ModuleShape
from stackctl.plan.build import plan_stack
from stackctl.plan.lint import GGUF_ARCHITECTURES, TARGETS, VLLM_RANKS, lint_for

BASE = msgspec.structs.replace(make_base(), input_embedding="model.embed_tokens")
TIED = msgspec.structs.replace(BASE, tied_embeddings=True)


def on(architecture, base=BASE):
    return msgspec.structs.replace(base, architecture=architecture)


def planned(config=None, tensors=None, base=BASE, **rest):
    return plan_stack(base, [member(checkpoint=memory_checkpoint(config, tensors), **rest)])


def of_rank(*ranks, base=BASE):
    return plan_stack(
        base,
        [
            member(f"a{i}@1", checkpoint=memory_checkpoint(lora_config(r=rank), lora_tensors(rank=rank)))
            for i, rank in enumerate(ranks)
        ],
    )


def on_modules(*names, base=BASE):
    return planned(lora_config(target_modules=[name.rpartition(".")[2] for name in names]), lora_tensors(names), base)


def found(target, plan, dtype=None):
    return {problem.code: problem.severity for problem in lint_for(target, plan, dtype=dtype)}


@pytest.mark.parametrize("target", ["vllm", "gguf"])
def test_a_plain_small_stack_is_fine(target):
    assert lint_for(target, planned()) == []
    assert lint_for(target, plan_stack(BASE, [])) == []


def test_targets_are_named():
    assert list(TARGETS) == ["vllm", "gguf", "ollama"]
    with pytest.raises(Usage) as caught:
        lint_for("vlm", planned())
    assert "vllm" in caught.value.hint


# -- vLLM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "needed"),
    [((16,), None), ((8, 8), None), ((17,), 32), ((16, 16), 32), ((64, 64), 128), ((128, 130), 320), ((512,), 512)],
)
def test_vllm_has_to_be_told_a_rank_above_16(ranks, needed):
    problems = lint_for("vllm", of_rank(*ranks))
    assert len(problems) == (needed is not None)
    for problem in problems:
        assert (problem.code, problem.severity) == ("vllm_rank", "warning")
        assert f"rank {sum(ranks)}" in problem.message
        assert problem.hint.endswith(f"--max-lora-rank {needed}")


def test_vllm_serves_no_rank_above_its_largest():
    (problem,) = lint_for("vllm", of_rank(256, 257))
    assert (problem.code, problem.severity) == ("vllm_rank", "error")
    assert "513" in problem.message
    assert str(VLLM_RANKS[-1]) in problem.message
    assert "--method svd" in problem.hint
    cut = plan_stack(BASE, of_rank(256, 257).members, "svd", MethodOptions(rank=8))
    assert lint_for("vllm", cut) == [], "the rank of what is written counts, not that of the sum"


@pytest.mark.parametrize(
    ("architecture", "severity"),
    [
        ("LlamaForCausalLM", None),
        ("Qwen3ForCausalLM", None),
        ("MistralForCausalLM", "error"),
        ("Qwen2ForCausalLM", "error"),
        ("SomethingForCausalLM", "warning"),
    ],
)
@pytest.mark.parametrize("module", ["lm_head", "model.embed_tokens"])
def test_vllm_takes_lora_on_embeddings_of_some_models(architecture, severity, module):
    problems = lint_for("vllm", on_modules(module, base=on(architecture)))
    assert [p.severity for p in problems] == ([severity] if severity else [])
    assert all(p.code == "vllm_embeddings" and module in p.message and architecture in p.message for p in problems)


def test_vllm_has_models_without_lora():
    assert found("vllm", planned(base=on("GPT2LMHeadModel"))) == {"vllm_architecture": "error"}


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_what_a_plain_lora_cannot_hold(target):
    saved = lora_tensors() | {"base_model.model.model.norm.weight": (8,), "base_model.model.head.bias": (8,)}
    plan = planned(lora_config(modules_to_save=["norm", "head"]), saved)
    (problem,) = [p for p in lint_for(target, plan) if p.code == f"{target}_modules_to_save"]
    assert (problem.severity, problem.member) == ("error", "style@1")
    assert "head, model.norm" in problem.message
    assert f"{target}_bias" not in found(target, plan), "a saved module's own bias is part of it"

    biases = lora_tensors() | {f"base_model.model.{name}.base_layer.bias": (8,) for name in attention()}
    assert found(target, planned(lora_config(bias="lora_only"), biases))[f"{target}_bias"] == "error"
    assert f"{target}_modules_to_save" not in found(target, planned(lora_config(bias="lora_only"), biases))

    assert found(target, planned(lora_config(use_dora=True)))[f"{target}_dora"] == "error"


@pytest.mark.parametrize("target", TARGETS)
def test_a_member_of_weight_zero_brings_none_of_it(target):
    saved = lora_tensors() | {"base_model.model.model.norm.weight": (8,)}
    plan = planned(lora_config(modules_to_save=["norm"], use_dora=True), saved, weight=0.0)
    assert "error" not in found(target, plan).values()


def test_without_a_base_the_rest_is_still_said():
    plan = planned(lora_config(r=600), lora_tensors(rank=600), base=None)
    assert found("vllm", plan) == {"vllm_rank": "error"}
    assert found("gguf", plan) == {"gguf_architecture": "warning"}


# -- llama.cpp and Ollama ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["GPTNeoXForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM"])
@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_only_known_architectures(target, architecture):
    problems = lint_for(target, planned(base=on(architecture)))
    errors = [p for p in problems if p.severity == "error"]
    assert [p.code for p in errors] == [f"{target}_architecture"]
    assert architecture in errors[0].message
    assert architecture not in GGUF_ARCHITECTURES


def test_exactly_the_llama_like_are_permuted():
    permuted = {name for name, architecture in GGUF_ARCHITECTURES.items() if architecture.permuted}
    assert permuted == {"LlamaForCausalLM", "MistralForCausalLM", "GraniteForCausalLM", "SmolLM3ForCausalLM"}


@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_embeddings_in_llama_cpp(target):
    for module in ("model.embed_tokens", "lm_head"):
        assert "error" not in found(target, on_modules(module)).values()
        problems = lint_for(target, on_modules(module, "model.layers.0.self_attn.q_proj", base=TIED))
        errors = [p for p in problems if p.severity == "error"]
        assert [p.code for p in errors] == [f"{target}_tied_embeddings"]
        assert module in errors[0].message
        assert "style@1" in errors[0].message


def test_position_embeddings_have_no_lora_in_llama_cpp():
    modules = base_modules() | {"wpe": ModuleShape(type="Embedding", shape=[16, 8])}
    base = msgspec.structs.replace(on("GPT2LMHeadModel"), modules=modules)
    tensors = {"base_model.model.wpe.lora_embedding_A": (2, 16), "base_model.model.wpe.lora_embedding_B": (8, 2)}
    plan = planned(lora_config(target_modules=["wpe"]), tensors, base)
    assert not plan.errors
    assert found("gguf", plan) == {"gguf_embeddings": "error"}


def test_a_dtype_that_is_not_written():
    assert found("gguf", planned(), "float16") == {}
    assert found("gguf", planned(), "bfloat16") == {"gguf_dtype": "error"}
    assert found("vllm", planned(), "bfloat16") == {}


def test_ollama_is_warned_about_even_when_all_is_well():
    (problem,) = lint_for("ollama", planned())
    assert (problem.code, problem.severity) == ("ollama_adapter", "warning")
    assert "0.34.1" in problem.message
    assert problem.hint
