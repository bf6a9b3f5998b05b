"""A stack as an adapter of mlx-lm.

mlx-lm (mlx_lm/tuner/utils.py: load_adapters) has one rank and one scale for all layers.

One plain adapter keeps its factors, turned round, and its scale; a sum is one concatenated pair a layer at scale one.
Layers of a lower rank are filled up with zeros.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stackctl.core.errors import Incompatible
from stackctl.engine.merging import module_pair, pair_error
from stackctl.engine.safetensors_writer import SAFETENSORS_NAMES, SafetensorsWriter
from stackctl.engine.tensors import TORCH_DTYPES, MemberTensors, tensor_bytes
from stackctl.lora.checkpoint import CONFIG
from stackctl.lora.mlx import MLX_WEIGHTS, peft_alpha
from stackctl.lora.safetensors_header import DTYPE_NAMES
from stackctl.lora.target_modules import expand_modules, natural_order
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import ModulePlan, StackPlan
from stackctl.storage import atomic

_DECODERS = {
    "LlamaForCausalLM": ("model.", "model."), "MistralForCausalLM": ("model.", "model."),
    "Qwen2ForCausalLM": ("model.", "model."), "Qwen3ForCausalLM": ("model.", "model."),
    "GemmaForCausalLM": ("model.", "model."), "Gemma2ForCausalLM": ("model.", "model."),
    "Gemma3ForCausalLM": ("model.", "model."), "Phi3ForCausalLM": ("model.", "model."),
    "GPT2LMHeadModel": ("transformer.", "model."),
}  # fmt: skip
"""Classes whose layers mlx-lm (mlx_lm/models/*.py) calls as transformers does, and what leads to them in each."""
_LAYER = re.compile(r"model\.(?:layers|h)\.([0-9]+)\.(.+)")


def export_mlx(plan: StackPlan, out: Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Write ``adapters.safetensors`` and ``adapter_config.json`` of mlx-lm.

    ``auto`` keeps the dtype of one plain adapter, bit for bit, and is float32 for anything else.

    Raises:
        Incompatible: mlx-lm cannot hold it, with everything that stands in the way.
    """
    plan.check()
    names = _names(plan)
    scale = _one_scale(plan)
    stored = {factor.a.dtype for module in plan.modules.values() for factor in module.factors}
    kept = scale is not None and len(stored) == 1 and stored <= {"F32", "F16", "BF16"}
    code = (
        next(iter(stored)) if dtype == "auto" and kept else SAFETENSORS_NAMES["float32" if dtype == "auto" else dtype]
    )
    rank = max(plan.rank_of(module) for module in plan.modules.values())
    layout = []
    for name, module in plan.modules.items():
        rows, columns = reversed(module.shape) if module.type == "Embedding" else module.shape
        layout += [(f"{names[name]}.lora_a", code, (columns, rank)), (f"{names[name]}.lora_b", code, (rank, rows))]
    worst = 0.0
    with atomic.staging_directory(out.parent) as staged:
        with torch.no_grad(), MemberTensors(plan) as tensors:
            with SafetensorsWriter(staged / MLX_WEIGHTS, layout) as writer:
                for name, module in plan.modules.items():
                    pair, error = _pair(plan, module, tensors, TORCH_DTYPES[code], scale)
                    error = 0.0 if stored == {code} and scale is not None else error
                    a, b = (
                        functional.pad(factor, (0, 0, 0, rank - factor.shape[0])) for factor in (pair[0], pair[1].T)
                    )
                    writer.write(f"{names[name]}.lora_a", tensor_bytes(name, a.T))
                    writer.write(f"{names[name]}.lora_b", tensor_bytes(name, b))
                    worst = max(worst, error)
            digest = writer.check()
        config = _config(plan, list(names.values()), rank, 1.0 if scale is None else _told_scale(scale, rank))
        atomic.write_atomic(staged / CONFIG, json.dumps(config, indent=4) + "\n")
        atomic.publish_directory(staged, out)
    exact = worst == 0.0 and plan.method == SUM
    return {
        "rank": rank, "max_relative_error": worst, "exact": exact, "digests": {MLX_WEIGHTS: digest},
        "dtype": DTYPE_NAMES[code],
    }  # fmt: skip


def _names(plan: StackPlan) -> dict[str, str]:
    """The modules of a plan by mlx-lm's names.

    Raises:
        Incompatible: with all that mlx-lm has no place for.
    """
    base = plan.known_base
    problems = []
    if not plan.modules:
        problems.append(f"{plan.expression} adds no factors to the base")
    if plan.replacements:
        problems.append(plan.brought)
    if plan.token_rows:
        problems.append("it trains rows of single tokens")
    if experts := [name for name, module in plan.modules.items() if module.is_experts]:
        problems.append(f"it adapts experts, whose layers mlx-lm lays out otherwise: {experts[0]}")
    if base.architecture not in _DECODERS:
        problems.append(f"what mlx-lm calls the layers of {base.architecture} is not known here")
    shared = (base.input_embedding, base.output_embedding) if base.tied_embeddings else ()
    if tied := [name for name in plan.modules if name in shared]:
        problems.append(f"{tied[0]} is one weight for embedding and head in mlx-lm, and adapted alone here")
    if problems:
        raise Incompatible(f"{'; '.join(problems)}: mlx-lm cannot hold that", hint="--format model, which mlx-lm loads")
    ours, theirs = _DECODERS[base.architecture]
    return {name: f"{theirs}{name.removeprefix(ours)}" if name.startswith(ours) else name for name in plan.modules}


def _one_scale(plan: StackPlan) -> float | None:
    """The scale of a stack that is one adapter with weight one, one rank and one scaling; else None."""
    factors = [factor for module in plan.modules.values() for factor in module.factors]
    alike = {(factor.rank, factor.scaling, factor.weight) for factor in factors}
    if plan.method != SUM or len(factors) != len(plan.modules) or len(alike) != 1 or factors[0].weight != 1:
        return None
    return factors[0].scaling


def _told_scale(scaling: float, rank: int) -> float:
    """The scale that an alpha over a rank was made of, where a short one is the same: no quotient by 3 is 0.1."""
    short = float(f"{scaling:.15g}")
    return short if peft_alpha(short, rank) / rank == scaling else scaling


def _pair(
    plan: StackPlan, module: ModulePlan, tensors: MemberTensors, dtype: torch.dtype, scale: float | None
) -> tuple[tuple[Tensor, Tensor], float]:
    """A module's A (r, in) and B (out, r) in ``dtype``, and their error: none where they are as they were."""
    factors = tensors.factors(module)
    a, b = module_pair(plan, module, factors) if scale is None else factors[0][:2]
    a, b = a.to(dtype), b.to(dtype)
    if dtype == torch.float32 and plan.method == SUM:
        return (a, b), 0.0
    return (a, b), pair_error(module, factors, (a.float() * (1.0 if scale is None else scale), b.float()))


def _config(plan: StackPlan, names: list[str], rank: int, scale: float) -> dict[str, Any]:
    """mlx-lm's configuration: layers by their names inside a block where all blocks are alike, else by whole names."""
    base = plan.known_base
    blocks = {m[1] for name in expand_modules(base.modules) if (m := re.search(r"\.(?:layers|h)\.([0-9]+)\.", name))}
    found = [match for name in names if (match := _LAYER.fullmatch(name))]
    keys = sorted({match[2] for match in found})
    if len(found) != len(names) or len(found) != len(keys) * len(blocks):
        keys = sorted(names, key=natural_order)
    return {
        "model": base.hub_id or base.source,
        "fine_tune_type": "lora",
        "num_layers": len(blocks),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
