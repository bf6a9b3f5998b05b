"""A registry of many adapters with many versions each, whose entries are as training writes them."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

from stackctl.core.provenance import DataSource, Run
from stackctl.core.schema import Adapter, AdapterVersion, Base, ModuleShape
from stackctl.core.train_job import TrainSettings
from stackctl.lora.checkpoint import Checkpoint, read_checkpoint
from stackctl.lora.lora_config import describe_lora
from stackctl.registry.base_entries import save_base
from stackctl.registry.store import Registry, init_registry, now

_WIDTH = 8
_NAME = "the-one"


def adapter_name(number: int) -> str:
    """What the adapters are called."""
    return f"adapter-{number:05}"


def write_checkpoint(folder: Path, seed: int) -> Path:
    """A valid LoRA on one small module, with bytes of its own."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    size = 4 * _WIDTH
    header = json.dumps(
        {
            f"{module}.lora_A.weight": {"dtype": "F32", "shape": [1, _WIDTH], "data_offsets": [0, size]},
            f"{module}.lora_B.weight": {"dtype": "F32", "shape": [_WIDTH, 1], "data_offsets": [size, 2 * size]},
        }
    ).encode()
    data = struct.pack(f"<{2 * _WIDTH}f", *[float(seed)] * (2 * _WIDTH))
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return folder


def registry_of_many(folder: Path, adapters: int, versions: int) -> Registry:
    """``adapters`` with ``versions`` each, all on one base and, but for the first, on the adapter before them.

    One entry is written by the registry itself; the others are that text with another name and other digests.
    """
    root = folder / "registry"
    init_registry(root)
    registry = Registry(root.resolve())
    modules = {"model.layers.0.self_attn.q_proj": ModuleShape(type="Linear", shape=[_WIDTH, _WIDTH])}
    base = Base(
        name="small", kind="hub", source="example/small", fingerprint="sha256:" + "0" * 64,
        architecture="LlamaForCausalLM", parameters=1000, dtype="float32", vocabulary_size=100, modules=modules,
    )  # fmt: skip
    save_base(registry, base)
    shared = read_checkpoint(write_checkpoint(folder / "shared", 0))
    made = [_version(_digest(_NAME, number), number, base, shared, root) for number in range(1, versions + 1)]
    registry.write(Adapter(name=_NAME, versions=made))
    entry = root / "adapters" / f"{_NAME}.yaml"
    text = entry.read_text()
    entry.unlink()
    for number in range(adapters):
        name, before = adapter_name(number), adapter_name(max(0, number - 1))
        own = text.replace(f"name: {_NAME}", f"name: {name}").replace("before", before)
        for version in range(1, versions + 1):
            own = own.replace(_digest(_NAME, version), _digest(name, version))
        (root / "adapters" / f"{name}.yaml").write_text(own)
    return registry


def _digest(name: str, version: int) -> str:
    return f"sha256:{hashlib.sha256(f'{name}@{version}'.encode()).hexdigest()}"


def _version(digest: str, number: int, base: Base, checkpoint: Checkpoint, root: Path) -> AdapterVersion:
    """What training says of a version."""
    return AdapterVersion(
        version=number, digest=digest, path=os.path.relpath(checkpoint.path, root), base=base.name,
        fingerprint=base.fingerprint, trained_on=["before@1"], created=now(), lora=describe_lora(checkpoint.config),
        parameters=checkpoint.parameters, dtype=checkpoint.dtype, bytes=checkpoint.bytes,
        data=DataSource(path="chat.jsonl", sha256=base.fingerprint, records=200, format="messages"),
        settings={name: getattr(TrainSettings(), name) for name in TrainSettings.__struct_fields__},
        run=Run(
            steps=150, epochs=3.0, loss=1.2345, tokens=100_000, supervised_tokens=50_000, seconds=123.4, frozen="fold",
            frozen_error=1e-7,
        ),
        versions={"stackctl": "0.1.0", "peft": "0.21.2", "transformers": "5.23.0", "torch": "2.13.0"},
    )  # fmt: skip
