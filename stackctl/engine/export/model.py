"""A stack summed into its base, as a full model: shard by shard, in float32, rounded once."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stackctl.core.errors import Incompatible, VerificationFailed
from stackctl.engine.merging import exact_delta, module_delta
from stackctl.engine.safetensors_writer import SAFETENSORS_NAMES, SafetensorsWriter
from stackctl.engine.tensors import TORCH_DTYPES, MemberTensors, tensor_bytes
from stackctl.lora.checkpoint import DTYPE_NAMES, TensorInfo, read_header
from stackctl.plan.methods import SUM
from stackctl.plan.model import ModulePlan, Replacement, StackPlan
from stackctl.registry.base_models import read_json, weight_files
from stackctl.storage import files

_INDEX = "model.safetensors.index.json"
_ALONGSIDE = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = {_INDEX, "adapter_config.json", "adapter_info.json", "trainer_state.json"}
_SINGLE, _SECOND = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_EXTRA = "model-untied.safetensors"


@dataclass(frozen=True)
class _Source:
    """One tensor to write: what of the base it is made from, and what stands on it."""

    name: str
    info: TensorInfo
    path: Path
    dtype: str
    module: ModulePlan | None = None
    replacement: Replacement | None = None


def export_model(plan: StackPlan, base: Path, out: Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Write the base with the stack in it. ``base`` is the base's folder; ``auto`` keeps each tensor's own dtype.

    No more than one tensor is in memory at a time. Tied embeddings of which the stack touches one are untied.

    Returns:
        ``rank``; ``max_relative_error``, the worst module's ‖(W' - W) - ΔW‖ / ‖ΔW‖ with ΔW the exact sum: what rounding
        to the dtype lost, and what the method is away from the sum; ``exact``: a sum in float32; ``digests``, the
        ``sha256:<hex>`` of the shards.

    Raises:
        Incompatible, VerificationFailed, Usage: the plan has problems, a tensor is stored in another layout than the
        model's, a value is not finite or does not fit the dtype, ``out`` is taken.
    """
    plan.check()
    shards, untied = _sources(plan, base, dtype)
    with files.staging_directory(out.parent) as staged, torch.no_grad(), MemberTensors(plan) as tensors:
        worst, digests = 0.0, dict[str, str]()
        for name, sources in shards.items():
            error, digests[name] = _write_shard(plan, tensors, staged / name, sources)
            worst = max(worst, error)
        _write_side_files(plan, base, staged, shards, untied=untied, dtype=dtype)
        _check_written(staged, shards)
        files.publish_directory(staged, out)
    changed = [source for sources in shards.values() for source in sources if source.module or source.replacement]
    exact = plan.method == SUM and all(source.dtype in ("F32", "F64") for source in changed)
    return {"rank": plan.rank, "max_relative_error": worst, "exact": exact, "digests": digests}


def _sources(plan: StackPlan, base: Path, dtype: str) -> tuple[dict[str, list[_Source]], bool]:
    """What every shard holds, and whether a tied pair has to be untied (then it gets a shard of its own)."""
    known = plan.base
    assert known is not None, "a stack that is exported stands on a base"
    found = {path: read_header(path) for path in weight_files(base)}
    names = {name for header in found.values() for name in header}
    embedding, head = (known.input_embedding, known.output_embedding) if known.tied_embeddings else (None, None)
    absent = (
        f"{head}.weight" if head and f"{head}.weight" not in names else None
    )  # a tied head is stored once, as its twin
    modules = {_on_disk(m.parameter, names, plan): m for m in plan.modules.values() if m.parameter != absent}
    replaced = {_on_disk(r.parameter, names, plan): r for r in plan.replacements if r.parameter != absent}

    def source(name: str, path: Path, info: TensorInfo) -> _Source:
        is_float = info.dtype in DTYPE_NAMES
        wanted = SAFETENSORS_NAMES[dtype] if dtype != "auto" and is_float else info.dtype
        return _Source(name, info, path, wanted, modules.get(name), replaced.get(name))

    shards = {path.name: [source(name, path, info) for name, info in header.items()] for path, header in found.items()}
    touched = {module.name for module in plan.modules.values()} | {
        r.parameter.removesuffix(".weight") for r in plan.replacements
    }
    untied = bool(head and {embedding, head} & touched)
    if untied and absent is not None and head is not None:
        twin = _on_disk(f"{embedding}.weight", names, plan)
        path, info = next((path, header[twin]) for path, header in found.items() if twin in header)
        wanted = SAFETENSORS_NAMES[dtype] if dtype != "auto" else info.dtype
        on_head = next((r for r in plan.replacements if r.parameter == absent), None)
        if len(shards) == 1:  # readers prefer model.safetensors to an index, so a second file needs the first renamed
            shards = {_SINGLE: next(iter(shards.values()))}
        shards[_SECOND if len(shards) == 1 else _EXTRA] = [
            _Source(absent, info, path, wanted, plan.modules.get(head), on_head)
        ]
    return shards, untied


def _on_disk(parameter: str, names: set[str], plan: StackPlan) -> str:
    """A parameter's name in the base's files, where some leave out the model's prefix.

    Raises:
        Incompatible: it is stored under another name or in another layout.
    """
    without = parameter.partition(".")[2]
    for candidate in (parameter, without):
        if candidate in names:
            return candidate
    assert plan.base is not None
    raise Incompatible(
        f"{parameter} of '{plan.base.name}' is stored in another layout, so that no full model can be written",
        hint="export with --format peft",
    )


def _write_shard(plan: StackPlan, tensors: MemberTensors, path: Path, sources: list[_Source]) -> tuple[float, str]:
    """Write one shard; returns the worst relative error of the deltas in it, and the file's digest."""
    worst = 0.0
    layout = [(s.name, s.dtype, s.info.shape) for s in sources]
    with SafetensorsWriter(path, layout) as writer:
        for source in sources:
            wanted = TORCH_DTYPES[source.dtype]
            if source.replacement is not None:
                weight = tensors.of(source.replacement.member, source.replacement.tensor)
            else:
                weight = tensors.read(source.path, source.info)
            if source.module is not None:
                factors = tensors.factors(source.module)
                delta = module_delta(plan, source.module, factors)
                wished = delta if plan.method == SUM else exact_delta(source.module, factors)
                if source.module.is_transposed:
                    delta, wished = delta.mT, wished.mT
                summed = (weight.float() + delta).to(wanted)
                worst = max(worst, _lost(weight, wished, summed))
                weight = summed
            writer.write(source.name, tensor_bytes(source.name, weight.to(wanted)))
    return worst, writer.check()


def _lost(before: Tensor, delta: Tensor, after: Tensor) -> float:
    """‖(after - before) - delta‖ / ‖delta‖, in float64."""
    norm = float(delta.double().norm())
    return float((after.double() - before.double() - delta.double()).norm()) / norm if norm else 0.0


def _write_side_files(
    plan: StackPlan, base: Path, staged: Path, shards: dict[str, list[_Source]], *, untied: bool, dtype: str
) -> None:
    """Configuration, generation defaults and tokenizer: the base's, then the newest member's that brings its own."""
    folders = [base, *(member.checkpoint.path for member in plan.members)]
    for folder in folders:
        for pattern in _ALONGSIDE:
            for path in folder.glob(pattern):
                is_model_file = path.name in ("config.json", "generation_config.json")
                if path.name not in _NOT_COPIED and (folder == base or not is_model_file):
                    shutil.copyfile(path, staged / path.name)
    config = read_json(base / "config.json")
    if untied:
        config["tie_word_embeddings"] = False
    if dtype != "auto":
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    files.write_atomic(staged / "config.json", json.dumps(config, indent=2) + "\n")
    if len(shards) > 1:
        sizes = [path.stat().st_size for path in staged.glob("*.safetensors")]
        weight_map = {source.name: shard for shard, sources in shards.items() for source in sources}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        files.write_atomic(staged / _INDEX, json.dumps(index, indent=2) + "\n")


def _check_written(staged: Path, shards: dict[str, list[_Source]]) -> None:
    """Read every header back and compare names, shapes and dtypes with what was planned.

    Raises:
        VerificationFailed: they differ.
    """
    for name, sources in shards.items():
        written = {t.name: (t.dtype, t.shape) for t in read_header(staged / name).values()}
        if written != {s.name: (s.dtype, s.info.shape) for s in sources}:
            raise VerificationFailed(f"what was written into {name} is not what was planned")
