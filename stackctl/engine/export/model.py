"""A stack summed into its base, as a full model: shard by shard, in float32, rounded once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from stackctl.core.errors import VerificationFailed
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.base.model_class import quantised_skeleton
from stackctl.engine.export.model_tensors import ModelTensors, Written
from stackctl.engine.safetensors_writer import SafetensorsWriter
from stackctl.engine.tensors import MemberTensors, tensor_bytes
from stackctl.engine.token_rows import refuse_unlike_peft
from stackctl.lora.safetensors_header import DTYPE_NAMES, read_header
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.base_models import INDEX_FILE
from stackctl.registry.base_quantization import KEYS
from stackctl.storage import atomic
from stackctl.storage.files import read_json

_SINGLE = "model.safetensors"
_ALONGSIDE = ("*.json", "*.jinja", "*.model", "*.txt")
_NOT_COPIED = {INDEX_FILE, "adapter_config.json", "adapter_info.json", "trainer_state.json"}


def export_model(plan: StackPlan, base: Path, out: Path, *, dtype: str = "auto") -> dict[str, Any]:
    """Write the base with the stack in it. ``base`` is the base's folder; ``auto`` keeps each tensor's own dtype.

    No more than one tensor is in memory at a time. Tied embeddings of which the stack touches one are untied.

    Returns:
        ``rank``; ``max_relative_error``, the worst module's ‖(W' - W) - ΔW‖ / ‖ΔW‖ with ΔW the exact sum: what rounding
        to the dtype lost, and what the method is away from the sum; ``exact``: a sum in float32; ``dtype``, what was
        written, joined by ``+`` where tensors have several; ``digests``, the ``sha256:<hex>`` of the shards.

    Raises:
        Incompatible, VerificationFailed, Usage: the plan has problems, a tensor is stored in another layout than the
        model's, a value is not finite or does not fit the dtype, ``out`` is taken.
    """
    plan.check()
    model, quantizer = quantised_skeleton(base, torch.float32)
    refuse_unlike_peft(plan, model)
    source = ModelTensors(plan, BaseLayout(base, model, quantizer), quantizer is not None, dtype)
    shards = source.shards()
    with atomic.staging_directory(out.parent) as staged, torch.no_grad(), MemberTensors(plan) as tensors:
        digests = {}
        for name, wanted in shards.items():
            with SafetensorsWriter(staged / name, [(t.name, t.dtype, t.shape) for t in wanted]) as writer:
                for tensor in wanted:
                    writer.write(tensor.name, tensor_bytes(tensor.name, source.value(tensor, tensors)))
            digests[name] = writer.check()
        _write_side_files(source, base, staged, shards)
        _check_written(staged, shards)
        atomic.publish_directory(staged, out)
    written = [tensor for wanted in shards.values() for tensor in wanted]
    exact = plan.method == SUM and all(tensor.dtype in ("F32", "F64") for tensor in written if tensor.changed)
    dtypes = sorted({DTYPE_NAMES[tensor.dtype] for tensor in written if tensor.dtype in DTYPE_NAMES})
    return {
        "rank": plan.rank, "max_relative_error": source.worst, "exact": exact, "dtype": "+".join(dtypes),
        "digests": digests,
    }  # fmt: skip


def _write_side_files(source: ModelTensors, base: Path, staged: Path, shards: dict[str, list[Written]]) -> None:
    """Configuration, generation defaults and tokenizer: the base's, then the newest member's that brings its own."""
    folders = [base, *(member.checkpoint.path for member in source.plan.members)]
    for folder in folders:
        for pattern in _ALONGSIDE:
            for path in folder.glob(pattern):
                is_model_file = path.name in ("config.json", "generation_config.json")
                if path.name not in _NOT_COPIED and (folder == base or not is_model_file):
                    shutil.copyfile(path, staged / path.name)
    config = read_json(base / "config.json")
    _describe_weights(config, source)
    config.pop("transformers_weights", None)  # the base's own file, of which this is none
    atomic.write_atomic(staged / "config.json", json.dumps(config, indent=2) + "\n")
    if set(shards) != {_SINGLE}:  # a single shard, too, is found by its index alone
        sizes = [path.stat().st_size for path in staged.glob("*.safetensors")]
        weight_map = {tensor.name: shard for shard, wanted in shards.items() for tensor in wanted}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
        atomic.write_atomic(staged / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _describe_weights(config: dict[str, Any], source: ModelTensors) -> None:
    """Have a configuration say what the weights now are; a text model's own part of it, too."""
    text = config.get("text_config")
    for part in (config, text) if isinstance(text, dict) else (config,):
        if source.untied:
            part["tie_word_embeddings"] = False
        if source.dtype != "auto":
            part["dtype"] = source.dtype
            part.pop("torch_dtype", None)
        if source.quantised:
            for key in KEYS:
                part.pop(key, None)


def _check_written(staged: Path, shards: dict[str, list[Written]]) -> None:
    """Read every header back and compare names, shapes and dtypes with what was planned.

    Raises:
        VerificationFailed: they differ.
    """
    for name, wanted in shards.items():
        written = {t.name: (t.dtype, t.shape) for t in read_header(staged / name).values()}
        if written != {t.name: (t.dtype, t.shape) for t in wanted}:
            raise VerificationFailed(f"what was written into {name} is not what was planned")
