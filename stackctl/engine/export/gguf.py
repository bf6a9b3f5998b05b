"""A stack as one LoRA adapter in GGUF, for llama.cpp.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What llama.cpp makes of an adapter stands in its
src/llama-adapter.cpp, llama-adapter.h and llama-graph.cpp (build_lora_mm, build_inp_embd), and how its own converter
names and lays out the tensors in convert_lora_to_gguf.py and conversion/llama.py:

- on every tensor the pair counts ``adapter.lora.alpha / rank`` times, with one alpha for all and the rank of that
  tensor; so every pair is padded with zeros to the largest rank, which is alpha;
- the factors are A (rank, in) and B (out, rank), of the token embedding A (vocabulary, rank) and B (dimension, rank);
- Llama-like models have the rows of q and k in another order than in Transformers, and so has B.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from stackctl.core.errors import Incompatible, VerificationFailed
from stackctl.engine.export.gguf_layout import GgufTarget, config_count, gguf_targets, lay_out, undo_layout
from stackctl.engine.merging import found_ranks, made_pairs
from stackctl.engine.tensors import all_finite, misfit
from stackctl.plan.lint import GGUF_ARCHITECTURES, GgufArchitecture, gguf_file_name, lint_for
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import StackPlan, refuse
from stackctl.storage import atomic
from stackctl.storage.files import read_json
from stackctl.storage.paths import existing_path

_DTYPES = {
    "float32": (torch.float32, np.float32, gguf.LlamaFileType.ALL_F32),
    "float16": (torch.float16, np.float16, gguf.LlamaFileType.MOSTLY_F16),
}
MODELFILE = "Modelfile"


@dataclass(frozen=True)
class _Adapter:
    """What is written: on which tensors of which architecture, of which rank on all of them, in which dtype."""

    architecture: GgufArchitecture
    targets: Sequence[GgufTarget]
    rank: int
    dtype: str

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype][0]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(_DTYPES[self.dtype][1])

    @property
    def file_type(self) -> int:
        return _DTYPES[self.dtype][2]

    def tensors(self) -> list[tuple[str, tuple[int, int], np.dtype[Any]]]:
        """Every tensor of the file, in its order, with its shape and dtype."""
        return [(name, shape, self.numpy_dtype) for target in self.targets for name, shape in target.layout(self.rank)]


_Written = tuple[int, tuple[str, str]]
"""What one module's pair was before it was laid out: its own rank, and digests of A and of B in their dtype."""


def export_gguf(
    plan: StackPlan,
    base: Path,
    out: Path,
    *,
    dtype: str = "float32",
    modelfile: bool = False,
    base_gguf: Path | None = None,
) -> dict[str, Any]:
    """Write a stack as a folder with one GGUF adapter, and with a ``Modelfile`` for Ollama if that is wanted.

    No more than one module is in memory at a time, and of the base only its configuration is read: ``base`` is its
    folder. ``base_gguf`` is the base as llama.cpp runs it: what the Modelfile names, and what the adapter's tensors
    are held against before anything is written. Without it the Modelfile names the base's folder.

    Returns:
        ``rank``; ``max_relative_error``, the worst module's ‖written - exact sum‖ / ‖exact sum‖; ``exact``: a sum in
        float32, which loses nothing.

    Raises:
        Incompatible, VerificationFailed, NotFound, Usage: the plan has problems, llama.cpp could not use it, a tensor
            is not finite or does not fit the dtype, ``base_gguf`` is missing, ``out`` is taken.
    """
    plan.check()
    if not plan.modules:
        raise Incompatible(
            f"{plan.expression} adds nothing to the base: there is no adapter to write",
            hint="--format model writes the base itself",
        )
    refuse([problem for problem in lint_for("gguf", plan, dtype=dtype) if problem.severity == "error"])
    architecture = GGUF_ARCHITECTURES[plan.known_base.architecture]
    config = read_json(base / "config.json")
    targets = gguf_targets(plan, architecture, config)
    if base_gguf is not None:
        _check_base(targets, architecture, config, existing_path(base_gguf, "the file"))
    rank = max(found_ranks(plan).values()) if plan.options.rank == "auto" else plan.rank
    adapter = _Adapter(architecture, targets, rank, dtype)
    with atomic.staging_directory(out.parent) as staged:
        path = staged / gguf_file_name(out)
        error, written = _write(plan, adapter, path)
        _check_written(adapter, path, written)
        if modelfile:
            atomic.write_atomic(staged / MODELFILE, _modelfile(plan, base_gguf or base, path.name))
        atomic.publish_directory(staged, out)
    return {"rank": rank, "max_relative_error": error, "exact": dtype == "float32" and plan.method == SUM}


def _check_base(
    targets: Sequence[GgufTarget], architecture: GgufArchitecture, config: Mapping[str, Any], path: Path
) -> None:
    """Hold the adapter's tensors against the base that it will run on.

    Raises:
        Incompatible: the file is no GGUF, of another architecture or other heads, or lacks a tensor of that shape.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise Incompatible(f"{path} cannot be read as GGUF ({error})") from error
    found = _field(reader, "general.architecture")
    if found != architecture.name:
        raise Incompatible(f"{path} is of the architecture {found}, not {architecture.name}")
    heads = config_count(config, "num_attention_heads", "n_head")
    key_heads = config_count(config, "num_key_value_heads", "num_attention_heads", "n_head")
    said = _field(reader, f"{found}.attention.head_count"), _field(reader, f"{found}.attention.head_count_kv")
    if said[0] != heads or said[1] not in (None, key_heads):
        raise Incompatible(f"{path} has {said[0]} and {said[1]} attention heads, not {heads} and {key_heads}")
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    for target in targets:
        if shapes.get(target.name) != target.module.shape:
            shape = shapes.get(target.name)
            what = f"has {target.name} of shape {list(shape)}" if shape else f"has no {target.name}"
            raise Incompatible(f"{path} {what}, where the stack adapts {list(target.module.shape)}")


def _field(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _write(plan: StackPlan, adapter: _Adapter, path: Path) -> tuple[float, dict[str, _Written]]:
    """Stream the file: its header from shapes alone, then the pairs one by one.

    Returns the worst module's relative error against the exact sum, and what every pair was.
    """
    worst, written = 0.0, dict[str, _Written]()
    writer = gguf.GGUFWriter(path, adapter.architecture.name)
    try:
        _write_header(writer, plan, adapter)
        for target, (_, (a, b), error) in zip(adapter.targets, made_pairs(plan, adapter.torch_dtype), strict=True):
            if not (all_finite(a) and all_finite(b)):
                raise misfit(target.name, adapter.dtype)
            worst = max(worst, error)
            written[target.name] = a.shape[0], (_digest(a.numpy()), _digest(b.numpy()))
            for factor in lay_out(a, b, target, adapter.rank):
                _write_values(writer, factor.contiguous().numpy())
    finally:
        writer.close()
    return worst, written


def _write_values(writer: Any, values: Any) -> None:
    """As ``GGUFWriter.write_tensor_data`` does, by Python's own file: the ``tofile`` of numpy drops the error of its
    last flush, so that a full disk leaves a short file.
    """
    [file] = writer.fout
    writer.write_padding(file, file.tell())
    file.write(values.data)
    writer.write_padding(file, values.nbytes)


def _write_header(writer: Any, plan: StackPlan, adapter: _Adapter) -> None:
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter.rank))
    writer.add_name(plan.expression)
    writer.add_file_type(adapter.file_type)
    if plan.base is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, plan.base.name)
        if plan.base.hub_id:
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{plan.base.hub_id}")
    for name, shape, dtype in adapter.tensors():
        writer.add_tensor_info(name, shape, dtype, shape[0] * shape[1] * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _digest(factor: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(factor).data).hexdigest()


def _check_written(adapter: _Adapter, path: Path, written: Mapping[str, _Written]) -> None:
    """Read the file as llama.cpp would, undo the layout, and compare every value with what the plan gave.

    Raises:
        VerificationFailed: a key, a name, a shape or a value differs.
    """
    reader = gguf.GGUFReader(path)
    keys = {
        "general.type": "adapter",
        "general.architecture": adapter.architecture.name,
        "adapter.type": "lora",
        "adapter.lora.alpha": float(adapter.rank),
    }
    if {key: _field(reader, key) for key in keys} != keys:
        raise VerificationFailed("what was written is not what was planned: the adapter's keys differ")
    found = [(tensor.name, tuple(tensor.data.shape), tensor.data.dtype) for tensor in reader.tensors]
    if adapter.tensors() != found:
        raise VerificationFailed("what was written is not what was planned: names, shapes or dtypes differ")
    for target, first, second in zip(adapter.targets, reader.tensors[::2], reader.tensors[1::2], strict=True):
        a, b = undo_layout(_values(path, first), _values(path, second), target)
        own_rank, digests = written[target.name]
        if a[own_rank:].any() or b[:, own_rank:].any():
            raise VerificationFailed(f"what was written is not what was planned: the padding of {target.name}")
        if (_digest(a[:own_rank]), _digest(b[:, :own_rank])) != digests:
            raise VerificationFailed(f"what was written is not what was planned: the values of {target.name}")


def _values(path: Path, tensor: Any) -> Any:
    """One tensor's values, read and not mapped: pages of a map would stay in memory until the whole file is there."""
    count = math.prod(tensor.data.shape)
    return np.fromfile(path, tensor.data.dtype, count, offset=tensor.data_offset).reshape(tensor.data.shape)


def _modelfile(plan: StackPlan, base: Path, adapter: str) -> str:
    """A Modelfile (https://docs.ollama.com/modelfile). Ollama takes the chat template from the base."""
    return (
        f"# {plan.expression} on {plan.known_base.name}: ollama create NAME -f {MODELFILE}\n"
        f"FROM {base.resolve()}\n"
        f"ADAPTER ./{adapter}\n"
    )
