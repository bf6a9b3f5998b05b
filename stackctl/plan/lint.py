"""What another program would reject or limit of a stack, known from its plan alone: no tensors, nothing heavy.

Checked in the sources of llama.cpp of October 2026 (conversion/*.py, src/llama-adapter.cpp, src/llama-graph.cpp,
convert_lora_to_gguf.py) and of vLLM 0.32 (vllm/config/lora.py, vllm/lora/peft_helper.py, vllm/lora/utils.py,
vllm/lora/lora_model.py, vllm/model_executor/models/*.py). The GGUF export refuses by this very list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from stackctl.core.errors import Incompatible, Usage, did_you_mean, listed
from stackctl.core.schema import Base
from stackctl.plan.methods import METHODS
from stackctl.plan.stack_plan import Problem, StackPlan
from stackctl.plan.whole_class import is_named_for


@dataclass(frozen=True, slots=True)
class GgufArchitecture:
    """An architecture as llama.cpp calls it (gguf-py/gguf/constants.py: MODEL_ARCH_NAMES).

    ``permuted``: its converter reorders the rows of q_proj and k_proj, from Transformers' rotary embedding by halves
    to llama.cpp's by neighbours (conversion/llama.py: LlamaModel.permute and undo_permute).
    """

    name: str
    permuted: bool = False


GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": GgufArchitecture("llama", permuted=True),
    "MistralForCausalLM": GgufArchitecture("llama", permuted=True),
    "GraniteForCausalLM": GgufArchitecture("granite", permuted=True),
    "SmolLM3ForCausalLM": GgufArchitecture("smollm3", permuted=True),
    "Qwen2ForCausalLM": GgufArchitecture("qwen2"),
    "Qwen3ForCausalLM": GgufArchitecture("qwen3"),
    "GemmaForCausalLM": GgufArchitecture("gemma"),
    "Gemma2ForCausalLM": GgufArchitecture("gemma2"),
    "Gemma3ForCausalLM": GgufArchitecture("gemma3"),
    "Phi3ForCausalLM": GgufArchitecture("phi3"),
    "GPT2LMHeadModel": GgufArchitecture("gpt2"),
}
"""The architectures whose export was compared with llama.cpp's own logits (benchmarks/llama_cpp_client.py).

The rest may be right by accident at best: GPT-NeoX's converter reorders a fused projection, a mixture's stacks its
experts into one tensor.
"""
GGUF_DTYPES = ("float32", "float16")


def gguf_file_name(out: Path) -> str:
    """What the adapter in an exported folder is called: as the folder, so that adapters can lie side by side.

    There is nothing in it that a Modelfile would trip over.
    """
    stem = re.sub(r"[^A-Za-z0-9._+-]+", "-", out.name.removesuffix(".gguf")).strip("-.")
    return f"{stem or 'adapter'}.gguf"


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of ``--max-lora-rank`` (vllm/config/lora.py: MaxLoRARanks); 16 unless it is given."""
VLLM_DEFAULT_RANK = 16
_VLLM_WITHOUT_LORA = ("BloomForCausalLM", "FalconForCausalLM", "GPT2LMHeadModel")
_VLLM_EMBEDDINGS = (
    "GraniteForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM", "Phi3ForCausalLM", "Qwen3ForCausalLM",
)  # fmt: skip
_VLLM_WITHOUT_EMBEDDINGS = (
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "GemmaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM",
)  # fmt: skip
_FULL_MODEL = "stackctl export --format model writes the whole model, which every program reads"


def lint_for(target: str, plan: StackPlan, *, dtype: str | None = None) -> list[Problem]:
    """What ``vllm``, ``gguf`` (llama.cpp) or ``ollama`` would reject (errors) or limit (warnings) of a stack.

    ``dtype`` is the precision that it is to be exported in, if that is decided. What is wrong with the stack itself
    is in ``plan.problems`` and not repeated, except what the target has a word of its own on.

    Raises:
        Usage: there is no such target.
    """
    lint = TARGETS.get(target)
    if lint is None:
        raise Usage(
            f"there is no target '{target}'", hint=did_you_mean(target, list(TARGETS), f"one of {', '.join(TARGETS)}")
        )
    return list(lint(plan, dtype))


def check_beside_base(target: str, plan: StackPlan) -> None:
    """Make sure that a program that keeps adapters beside the base, ``gguf`` or ``vllm``, answers as the stack does.

    Raises:
        Incompatible, VerificationFailed: with every reason.
    """
    plan.check()
    reasons = [problem.message for problem in lint_for(target, plan) if problem.severity == "error"]
    if not METHODS[plan.method].low_rank:
        reasons.append(f"what {plan.method} makes is not a pair of factors: as an adapter it would be cut to a rank")
    if reasons:
        raise Incompatible("; ".join(reasons), hint="--engine transformers answers with it, or compose it otherwise")


# -- llama.cpp ---------------------------------------------------------------------------------------------------------


def _lint_gguf(plan: StackPlan, dtype: str | None, target: str = "gguf") -> Iterator[Problem]:
    base = plan.base
    if base is None:
        what = "the base is not known, so that its architecture cannot be checked"
        yield Problem(f"{target}_architecture", what, "register it: stackctl base add", severity="warning")
    elif base.architecture not in GGUF_ARCHITECTURES:
        what = f"how llama.cpp lays out {base.architecture}, the architecture of '{base.name}', is not known here"
        yield Problem(f"{target}_architecture", what, _FULL_MODEL)
    if base is not None:
        yield from _gguf_embeddings(plan, base, target)
    # an adapter of ours has no tensors for parameters that are no layers of their own
    if found := sorted(m.name for m in plan.modules.values() if m.is_experts or m.type == "Matrix"):
        what = f"{listed(found, 2)} are parameters of a mixture, and GGUF adapters are written of linear layers only"
        yield Problem(f"{target}_experts", what, _FULL_MODEL)
    yield from _not_plain(plan, target, "llama.cpp")
    if dtype is not None and dtype not in GGUF_DTYPES:
        what = f"a GGUF adapter is written in {' or '.join(GGUF_DTYPES)}, not in {dtype}"
        yield Problem(f"{target}_dtype", what, "use --dtype float32")


def _gguf_embeddings(plan: StackPlan, base: Base, target: str) -> Iterator[Problem]:
    """LoRA on embeddings: llama.cpp applies it to the token embedding and to an output of its own, nowhere else.

    A tied model's GGUF has no output tensor; its output *is* ``token_embd.weight``, on which llama.cpp then multiplies
    the embedding's factors the wrong way round and aborts (src/llama-adapter.cpp: is_token_embd; src/llama-graph.cpp:
    build_inp_embd, build_lora_mm). Position embeddings are looked up without LoRA.
    """
    pair = {base.input_embedding, base.output_embedding} - {None}
    for module in plan.modules.values():
        owners = " and ".join(sorted({plan.members[factor.member].label for factor in module.factors}))
        if module.name in pair and base.tied_embeddings:
            what = f"{owners} adapts {module.name}, and '{base.name}' has one tensor for its embedding and its output"
            yield Problem(f"{target}_tied_embeddings", f"{what}, where llama.cpp has no LoRA", _FULL_MODEL)
        elif module.type == "Embedding" and module.name not in pair:
            what = f"{owners} adapts {module.name}, where llama.cpp has no LoRA"
            yield Problem(f"{target}_embeddings", what, _FULL_MODEL)


# -- Ollama ------------------------------------------------------------------------------------------------------------


def _lint_ollama(plan: StackPlan, dtype: str | None) -> Iterator[Problem]:
    """As for llama.cpp, and what Ollama adds.

    Its own engine refuses every adapter (runner/ollamarunner/runner.go: "loras are not yet implemented"), and since
    0.34.1 ``ollama create`` takes no ADAPTER any more (https://github.com/ollama/ollama/pull/14969, as told in
    https://github.com/generative-computing/mellea/issues/1651).
    """
    yield from _lint_gguf(plan, dtype, "ollama")
    what = "Ollama 0.34.1 and newer build no model from a Modelfile with ADAPTER"
    hint = "llama-server --lora serves it; or convert a full model: stackctl export --format model"
    yield Problem("ollama_adapter", f"{what}, and older ones run it only in llama.cpp", hint, severity="warning")


# -- vLLM --------------------------------------------------------------------------------------------------------------


def _lint_vllm(plan: StackPlan, dtype: str | None) -> Iterator[Problem]:
    most = vllm_max_rank(plan.rank)
    if most is None:
        what = f"the stack has rank {plan.rank}, and vLLM serves at most {VLLM_RANKS[-1]}"
        hint = f"compose it with --method svd --rank {VLLM_RANKS[-1]}, or use fewer members"
        yield Problem("vllm_rank", what, hint)
    elif plan.rank > VLLM_DEFAULT_RANK:
        what = (
            f"the stack has rank {plan.rank}, and vLLM serves at most {VLLM_DEFAULT_RANK} unless it is told otherwise"
        )
        yield Problem("vllm_rank", what, f"vllm serve … --max-lora-rank {most}", severity="warning")
    yield from _not_plain(plan, "vllm", "vLLM")
    base = plan.base
    if base is None:
        return
    if base.architecture in _VLLM_WITHOUT_LORA:
        what = f"vLLM has no LoRA for {base.architecture}, the architecture of '{base.name}'"
        yield Problem("vllm_architecture", what, _FULL_MODEL)
    if base.whole is not None and not is_named_for(plan, base.whole):
        what = f"vLLM serves '{base.name}' as {base.whole.architecture}, and finds there what begins with "
        what += f"{base.whole.decoder}; by other names an adapter has no effect, and nothing says so"
        yield Problem("vllm_names", what, f"stackctl export {plan.expression} --whole-class --out DIR")
    if experts := sorted(m.name for m in plan.modules.values() if m.is_experts):
        what = f"vLLM takes LoRA on the experts of some mixtures only, and this stack stands on {listed(experts, 2)}"
        yield Problem("vllm_experts", what, _FULL_MODEL, severity="warning")
    touched = [m for m in plan.modules.values() if m.type == "Embedding" or m.name == base.output_embedding]
    if touched and base.architecture not in _VLLM_EMBEDDINGS:
        names = " and ".join(m.name for m in touched)
        certain = base.architecture in (*_VLLM_WITHOUT_EMBEDDINGS, *_VLLM_WITHOUT_LORA)
        what = f"vLLM {'takes' if certain else 'may take'} no LoRA on {names} of {base.architecture}"
        yield Problem("vllm_embeddings", what, _FULL_MODEL, severity="error" if certain else "warning")


def vllm_max_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` with which vLLM serves an adapter of this rank; None where there is none."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


# -- all of them -------------------------------------------------------------------------------------------------------


def _not_plain(plan: StackPlan, target: str, program: str) -> Iterator[Problem]:
    """What a plain LoRA cannot hold: DoRA, whole modules, biases, single tokens. A member of weight zero has none."""
    for member in plan.members:
        if member.is_used and member.checkpoint.config.get("use_dora"):
            what = f"{member.label} is DoRA, which {program} does not apply"
            yield Problem(f"{target}_dora", what, "train it again as a plain LoRA", member.label)
    for index, member in enumerate(plan.members):
        whole = sorted({one.parameter.rpartition(".")[0] for one in plan.whole_modules if one.member == index})
        if whole:
            what = f"{member.label} carries whole modules ({', '.join(whole[:3])}), which {program} does not take"
            yield Problem(f"{target}_modules_to_save", what, _FULL_MODEL, member.label)
        if any(one.member == index for one in plan.trained_biases):
            what = f"{member.label} carries trained biases, which {program} does not take"
            yield Problem(f"{target}_bias", what, _FULL_MODEL, member.label)
        if modules := sorted({rows.module for rows in plan.token_rows if rows.member == index}):
            what = f"{member.label} trained rows of single tokens in {' and '.join(modules)}, and {program} takes none "
            yield Problem(f"{target}_tokens", f"{what}with a LoRA", _FULL_MODEL, member.label)


TARGETS: dict[str, Callable[[StackPlan, str | None], Iterator[Problem]]] = {
    "vllm": _lint_vllm,
    "gguf": _lint_gguf,
    "ollama": _lint_ollama,
}
