"""A registry with two random adapters of an 8B model (Llama-3-8B shapes), without the model: plans need no weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from stackctl.core.schema import AdapterVersion, Base, ModuleShape
from stackctl.engine.safetensors_writer import SafetensorsWriter
from stackctl.engine.tensors import tensor_bytes
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.lora.lora_config import describe_lora
from stackctl.registry.base_entries import save_base
from stackctl.registry.store import Registry, init_registry, now
from stackctl.registry.versions import add_version

_SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
LAYERS = 32


def large_registry(folder: Path, *, rank: int, layers: int = LAYERS) -> Path:
    """A registry with ``style`` and ``instruct``, of the given rank, in float32, on all layers or the first few."""
    root = folder / "registry"
    init_registry(root)
    registry = Registry(root)
    modules = {
        f"model.layers.{{0-{LAYERS - 1}}}.{name}": ModuleShape(type="Linear", shape=list(shape))
        for name, shape in _SHAPES.items()
    }
    base = Base(
        name="llama-8b", kind="hub", source="example/llama-8b", fingerprint="sha256:" + "0" * 64,
        architecture="LlamaForCausalLM", parameters=8_030_261_248, dtype="bfloat16", vocabulary_size=128256,
        modules=modules,
    )  # fmt: skip
    save_base(registry, base)
    for seed, name in enumerate(("style", "instruct")):
        checkpoint = folder / name
        _write_adapter(checkpoint, rank, layers, seed)
        _register(registry, name, checkpoint, base)
    return root


def _write_adapter(folder: Path, rank: int, layers: int, seed: int) -> None:
    folder.mkdir()
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "use_rslora": seed == 1,
        "target_modules": sorted(name.rpartition(".")[2] for name in _SHAPES), "task_type": "CAUSAL_LM",
        "layers_to_transform": list(range(layers)), "layers_pattern": "layers",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    layout = [
        (f"base_model.model.model.layers.{layer}.{name}.lora_{part}.weight", "F32", shape)
        for layer in range(layers)
        for name, (rows, columns) in _SHAPES.items()
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank)))
    ]
    generator = torch.Generator().manual_seed(seed)
    with SafetensorsWriter(folder / "adapter_model.safetensors", layout) as writer:
        for name, _, shape in layout:
            writer.write(name, tensor_bytes(name, torch.randn(shape, generator=generator)))


def _register(registry: Registry, name: str, folder: Path, base: Base) -> None:
    checkpoint = read_checkpoint(folder)

    def entry(number: int) -> AdapterVersion:
        return AdapterVersion(
            version=number, digest=checkpoint.digest(), path=os.path.relpath(folder, registry.root), base=base.name,
            fingerprint=base.fingerprint, created=now(), lora=describe_lora(checkpoint.config),
            parameters=checkpoint.parameters, dtype=checkpoint.dtype, bytes=checkpoint.bytes,
        )  # fmt: skip

    add_version(registry, name, entry, None)
