"""Carry out a plan as files for other programs: streaming, checked after writing, moved into place in one rename."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from stackctl import files
from stackctl.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from stackctl.engine import algebra
from stackctl.engine.models import MemberTensors, concatenated_config
from stackctl.errors import Incompatible, VerificationFailed
from stackctl.plan import ModulePlan, PlanMember, StackPlan, plan_stack

_DTYPES = {
    "float32": (torch.float32, "F32", 4),
    "bfloat16": (torch.bfloat16, "BF16", 2),
    "float16": (torch.float16, "F16", 2),
}
_PREFIX = "base_model.model."


def export_peft(plan: StackPlan, out: Path, *, dtype: str = "float32") -> dict[str, Any]:
    """Write a stack as one plain LoRA: alpha = rank on every module, so that every reader scales it by one.

    The base is never loaded, and no more than one module is in memory at a time.

    Returns:
        ``rank``, ``max_relative_error`` (the worst module's ‖written - exact‖ / ‖exact‖) and ``exact`` (float32).

    Raises:
        Incompatible, VerificationFailed, Usage: the plan has problems, a tensor is not finite, ``out`` is taken.
    """
    plan.check()
    if not plan.modules:
        raise Incompatible(f"{plan.expression} adds nothing to the base: there is no adapter to write")
    if plan.replacements:
        label = plan.members[plan.replacements[0].member].label
        raise Incompatible(f"{label} carries whole modules, which a plain LoRA cannot hold", hint="export a full model")
    with files.staging_directory(out.parent) as staged:
        error = _write_weights(plan, staged / WEIGHTS, dtype)
        _write_config(plan, staged / CONFIG)
        _check_written(plan, staged, dtype)
        files.publish_directory(staged, out)
    return {"rank": plan.rank, "max_relative_error": error, "exact": dtype == "float32"}


def _layout(module: ModulePlan) -> list[tuple[str, tuple[int, int]]]:
    """The two tensors of a module with their shapes, in the order of writing."""
    rows, columns = module.shape
    name = f"{_PREFIX}{module.name}"
    if module.type == "Embedding":
        return [
            (f"{name}.lora_embedding_A", (module.rank, rows)),
            (f"{name}.lora_embedding_B", (columns, module.rank)),
        ]
    return [(f"{name}.lora_A.weight", (module.rank, columns)), (f"{name}.lora_B.weight", (rows, module.rank))]


def _write_weights(plan: StackPlan, path: Path, dtype: str) -> float:
    """Stream the safetensors file: the header from the plan alone, then module by module."""
    torch_dtype, name, size = _DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for module in plan.modules.values():
        for tensor, shape in _layout(module):
            end = offset + shape[0] * shape[1] * size
            header[tensor] = {"dtype": name, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    worst = 0.0
    with path.open("wb") as stream, torch.no_grad(), MemberTensors(plan) as tensors:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for module in plan.modules.values():
            a, b = algebra.concatenate(tensors.factors(module))
            written = [factor.to(torch_dtype).contiguous() for factor in (a, b)]
            for factor in written:
                _write_tensor(stream, factor)
            if torch_dtype != torch.float32:
                worst = max(worst, algebra.relative_error((a, b), (written[0].float(), written[1].float())))
    return worst


def _write_tensor(stream: BinaryIO, tensor: Tensor) -> None:
    stream.write(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))


def _write_config(plan: StackPlan, path: Path) -> None:
    config = concatenated_config(plan).to_dict()
    base = plan.base
    config["base_model_name_or_path"] = (base.hub_id or base.source) if base else None
    config["target_modules"] = sorted(config["target_modules"])
    config["inference_mode"] = True
    files.write_atomic(path, json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")


def _check_written(plan: StackPlan, folder: Path, dtype: str) -> None:
    """Read the folder back as any other checkpoint and compare it with the plan, module by module.

    Raises:
        VerificationFailed: a shape, a dtype or a value is not what the plan says.
    """
    again = plan_stack(plan.base, [PlanMember("export", 1.0, read_checkpoint(folder))])
    shapes = {name: (module.shape, module.rank) for name, module in plan.modules.items()}
    written = {name: (module.shape, module.rank) for name, module in again.modules.items()}
    if again.errors or shapes != written:
        raise VerificationFailed(
            "what was written is not what was planned: " + "; ".join(p.message for p in again.errors)
        )
    with safe_open(folder / WEIGHTS, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (it is no mapping)
            if not bool(torch.isfinite(file.get_tensor(name)).all()):
                raise VerificationFailed(f"{name} does not fit {dtype}", hint="export with --dtype float32")
