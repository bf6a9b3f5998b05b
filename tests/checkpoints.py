"""PEFT-like checkpoints and bases for tests, written by hand: no torch, no safetensors, no numpy."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from stackctl.core.provenance import DataSource, HubSource, Run
from stackctl.core.schema import AdapterVersion, Base, Lora, ModuleShape
from stackctl.lora.checkpoint import Checkpoint, read_checkpoint
from stackctl.lora.safetensors_header import DTYPE_BYTES, TensorInfo
from stackctl.plan.stack_plan import PlanMember
from stackctl.registry.base_entries import resolve_base, save_base
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry, init_registry
from stackctl.registry.versions import add_version

FINGERPRINT = "sha256:" + "f" * 64
HIDDEN, VOCABULARY, LAYERS = 8, 32, 2

Tensors = dict[str, tuple[int, ...]]


def safetensors_bytes(
    tensors: Tensors, dtype: str = "F32", seed: int = 0, dtypes: dict[str, str] | None = None
) -> bytes:
    """A valid safetensors file: eight bytes of length, a JSON header, the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        kind = (dtypes or {}).get(name, dtype)
        size = DTYPE_BYTES[kind]
        for n in shape:
            size *= n
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    data = seed.to_bytes(4, "little") + bytes(7 * i % 50 for i in range(offset))
    return struct.pack("<Q", len(raw)) + raw + data[:offset]


def raw_safetensors(header: bytes | str | Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file that may lie: any header, any length, any data."""
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    raw = json.dumps(header).encode() if raw is None else raw
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def lora_config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes into adapter_config.json, in short."""
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "bias": "none",
        "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"], "fan_in_fan_out": False,
        "modules_to_save": None, "layers_to_transform": None, "layers_pattern": None, "rank_pattern": {},
        "alpha_pattern": {}, "use_rslora": False, "use_dora": False, "init_lora_weights": True, "inference_mode": True,
        "peft_version": "0.21.2",
    } | changes  # fmt: skip


def base_modules() -> dict[str, ModuleShape]:
    """The modules of a tiny Llama, by full name."""
    modules = {"model.embed_tokens": ModuleShape(type="Embedding", shape=[VOCABULARY, HIDDEN])}
    for i in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            modules[f"model.layers.{i}.self_attn.{name}"] = ModuleShape(type="Linear", shape=[HIDDEN, HIDDEN])
        modules[f"model.layers.{i}.mlp.up_proj"] = ModuleShape(type="Linear", shape=[2 * HIDDEN, HIDDEN])
    modules["lm_head"] = ModuleShape(type="Linear", shape=[VOCABULARY, HIDDEN])
    return modules


def make_base(name: str = "tiny", fingerprint: str = FINGERPRINT) -> Base:
    return Base(
        name=name, kind="folder", source="/tiny", fingerprint=fingerprint, path="/tiny",
        architecture="LlamaForCausalLM", parameters=1000, dtype="float32", vocabulary_size=VOCABULARY,
        output_embedding="lm_head", modules=base_modules(),
    )  # fmt: skip


def hub_base() -> Base:
    """The same base, from the Hub: its files are nowhere here, and need not be."""
    return msgspec.structs.replace(make_base(), kind="hub", source="acme/tiny", hub_id="acme/tiny", path=None)


def attention(names: Iterable[str] = ("q_proj", "v_proj"), layers: Iterable[int] = range(LAYERS)) -> list[str]:
    return [f"model.layers.{i}.self_attn.{name}" for i in layers for name in names]


def lora_tensors(modules: Iterable[str] | None = None, rank: int = 2) -> Tensors:
    """The tensors that PEFT saves for some modules of the tiny base."""
    shapes = base_modules()
    tensors: Tensors = {}
    for module in attention() if modules is None else modules:
        shape = shapes.get(module, ModuleShape(type="Linear", shape=[HIDDEN, HIDDEN]))
        rows, columns = shape.shape
        if shape.type == "Embedding":
            tensors[f"base_model.model.{module}.lora_embedding_A"] = (rank, rows)
            tensors[f"base_model.model.{module}.lora_embedding_B"] = (columns, rank)
        else:
            tensors[f"base_model.model.{module}.lora_A.weight"] = (rank, columns)
            tensors[f"base_model.model.{module}.lora_B.weight"] = (rows, rank)
    return tensors


def write_checkpoint(
    folder: Path, config: dict[str, Any] | None = None, tensors: Tensors | None = None, seed: int = 0
) -> Path:
    """A checkpoint folder as ``save_pretrained`` writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(lora_config() if config is None else config))
    data = safetensors_bytes(lora_tensors() if tensors is None else tensors, seed=seed)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def memory_checkpoint(
    config: dict[str, Any] | None = None, tensors: Tensors | None = None, dtypes: dict[str, str] | None = None
) -> Checkpoint:
    """A checkpoint that is nowhere on disk, for what is pure."""
    infos, position = {}, 0
    for name, shape in (lora_tensors() if tensors is None else tensors).items():
        infos[name] = TensorInfo(name, (dtypes or {}).get(name, "F32"), tuple(shape), position, position)
    return Checkpoint(Path("/nowhere"), lora_config() if config is None else config, infos)


def member(
    label: str = "style@1", weight: float = 1.0, checkpoint: Checkpoint | None = None, **rest: Any
) -> PlanMember:
    name, _, version = label.partition("@")
    fields = {"base": "tiny", "fingerprint": FINGERPRINT} | rest
    return PlanMember(
        label=label, weight=weight, checkpoint=checkpoint or memory_checkpoint(), adapter=name, version=int(version),
        digest=f"sha256:{name}", **fields,
    )  # fmt: skip


def make_registry(root: Path, *bases: Base) -> Registry:
    init_registry(root)
    registry = Registry(root.resolve())
    for base in bases or (make_base(),):
        save_base(registry, base)
    return registry


def register(
    registry: Registry,
    name: str,
    trained_on: Iterable[str] = (),
    base: str = "tiny",
    seed: int = 0,
    before_entry: Callable[[int], None] = lambda _: None,
) -> AdapterVersion:
    """Add one more version of an adapter, with weights of its own."""
    from stackctl.storage.atomic import staging_directory

    with staging_directory(registry.root / "weights" / name) as staged:
        checkpoint = read_checkpoint(write_checkpoint(staged, seed=seed))
        digest = checkpoint.digest()
        fingerprint = resolve_base(registry, base).fingerprint

        def build(number: int) -> AdapterVersion:
            before_entry(number)
            return AdapterVersion(
                version=number, digest=digest, path=registry.relative_weights_path(name, number), base=base,
                fingerprint=fingerprint, trained_on=list(trained_on), created="2026-01-31T12:00:00Z",
                lora=Lora(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]), parameters=checkpoint.parameters,
                dtype=checkpoint.dtype, bytes=checkpoint.bytes,
            )  # fmt: skip

        return add_version(registry, name, build, staged)


def full_version(number: int) -> AdapterVersion:
    """A version of which every field is filled, with values that a careless writer would spoil."""
    return AdapterVersion(
        version=number, digest="sha256:1", path=f"weights/x/{number}", base="tiny", fingerprint=FINGERPRINT,
        trained_on=["style@1:0.7", "other@2"], created="2026-01-31T12:00:00Z",
        lora=Lora(r=16, lora_alpha=0.5, target_modules=["on", "1e-5", "no"], rank_pattern={"q.*": 3}, use_rslora=True),
        parameters=10**12, dtype="bfloat16", bytes=7,
        data=DataSource(path="a b/ü: x.jsonl", sha256="0" * 64, records=3, format="messages"),
        settings={"learning_rate": 1e-5, "target_modules": "all-linear", "alpha": None, "pack": False, "seed": 0},
        run=Run(steps=5, epochs=2.5, loss=1e-7, tokens=9, supervised_tokens=8, seconds=0.1, frozen="fold",
        eval_loss=1e300),
        hub=HubSource(repo="me/x", commit="1234567"), versions={"torch": "2.13.0+cpu", "peft": "1.0"},
    )  # fmt: skip


def register_three(registry: Registry) -> None:
    """style@1 and style@2, and instruct@1, which was trained on the first of them."""
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    register(registry, "instruct", ["style@1"], seed=3)


def tree(registry: Registry) -> dict[str, bytes]:
    return {
        str(p.relative_to(registry.root)): p.read_bytes()
        for p in registry.root.rglob("*")
        if p.is_file() and p.name not in (".lock", ".digests.json")  # remembered hashes are written once files settled
    }


def labels(stack: ResolvedStack) -> list[str]:
    """The members of a stack as terms, pinned."""
    return [str(member) for member in stack.members]


def flip(path: Path) -> None:
    """Change the last bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def version(registry: Registry, label: str) -> AdapterVersion:
    name, _, number = label.partition("@")
    adapter = registry.find_adapter(name)
    assert adapter is not None, f"there is no {name}"
    return next(v for v in adapter.versions if v.version == int(number))


def plain_repo(tmp_path: Path, **config: Any) -> dict[str, bytes]:
    """What PEFT's push_to_hub makes, with things beside it that nobody asked for."""
    folder = write_checkpoint(tmp_path / "plain", lora_config(**config), seed=9)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {**files, "optimizer.pt": b"pickle", "training_args.bin": b"pickle", "run.py": b"code", "README.md": b"# x"}
