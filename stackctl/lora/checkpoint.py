"""A PEFT checkpoint by its config and its safetensors *header*: names and shapes, never tensors.

The format is that of PEFT's ``save_pretrained`` (src/peft/config.py, src/peft/utils/save_and_load.py).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from stackctl.core.errors import Incompatible, NotFound, Usage
from stackctl.core.schema import AdapterInfo
from stackctl.lora.lora_config import check_lora_config
from stackctl.lora.recognition import recognise_folder, refuse_pointer
from stackctl.lora.safetensors_header import DTYPE_NAMES, TensorInfo, read_header
from stackctl.storage.files import read_bounded, read_json, read_json_if_any
from stackctl.storage.hashes import sha256_bytes, sha256_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INFO = "adapter_info.json"
_WRAPPERS = frozenset(("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
"""What torch.compile, FSDP and activation checkpointing put into the names of what they wrap."""
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""What embedding and head are mostly called (src/peft/utils/constants.py: EMBEDDING_LAYER_NAMES)."""

Role = Literal["A", "B", "aside", "lora_bias", "magnitude", "tokens", "saved", "bias", "unknown"]


@dataclass(frozen=True, slots=True)
class Slot:
    """What a tensor's name says: the module it belongs to, and its part in that module's LoRA."""

    module: str
    role: Role


_SUFFIXES: tuple[tuple[str, Role], ...] = (
    (r"\.lora_A(?:\.[^.]+)?\.weight", "A"),
    (r"\.lora_B(?:\.[^.]+)?\.weight", "B"),
    (r"\.lora_embedding_A(?:\.[^.]+)?", "A"),
    (r"\.lora_embedding_B(?:\.[^.]+)?", "B"),
    (r"\.lora_B(?:\.[^.]+)?\.bias", "lora_bias"),
    (r"\.lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?", "magnitude"),
    (r"\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?", "tokens"),
    (r"(?:\.token_adapter)?\.base_layer\.weight", "aside"),
    (r"\.base_layer\.bias", "bias"),
    (r"\.lora_velora_embed(?:\.[^.]+)?", "aside"),  # what VeLoRA's backward pass projects on; no forward one does
)


_WRAPPED_MODULE = re.compile(r"\.(modules_to_save|original_module)(\.[^.]+)?$")


@cache
def _slots() -> tuple[tuple[re.Pattern[str], Role], ...]:
    """Compiled when the first name is asked for: most commands ask for none, and it takes as long as they do."""
    return tuple((re.compile(rf"(?P<module>.+?){suffix}"), role) for suffix, role in _SUFFIXES)


def _unwrapped(name: str) -> str:
    """A tensor's name without PEFT's prefix, also a doubled one, and without those of wrappers around the model."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1 if parts[0] == "module" else 2 :]
    return ".".join(parts)


def parse_tensor_name(name: str) -> Slot:
    """``base_model.model.a.b.lora_A.weight`` to module ``a.b``, role A.

    PEFT writes names without the adapter's; raw state dicts carry it (``lora_A.default.weight``); both are read.
    """
    bare = _unwrapped(name)
    for pattern, role in _slots():
        if match := pattern.fullmatch(bare):
            return Slot(match["module"], role)
    if bare.endswith(".bias"):
        return Slot(bare.removesuffix(".bias"), "bias")
    return Slot(bare.rpartition(".")[0] or bare, "unknown" if "lora_" in bare else "saved")


@dataclass(frozen=True)
class Checkpoint:
    """A PEFT checkpoint on disk.

    ``config`` is ``adapter_config.json`` as it stands; ``tensors`` the header of the weights. ``embeddings`` are the
    base's embedding and head, and what stands in them, by the names of this checkpoint: PEFT saves them beside any
    adapter where it is told to or where they were resized (``save_embedding_layers``), and loads them; None where no
    base is at hand.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    embeddings: frozenset[str] | None = None

    @property
    def weights_path(self) -> Path:
        return self.path / WEIGHTS

    @property
    def is_lora(self) -> bool:
        return str(self.config.get("peft_type", "")).upper() == "LORA"

    @cached_property
    def slots(self) -> dict[str, Slot]:
        return {name: self._slot(name) for name in self.tensors}

    def _slot(self, name: str) -> Slot:
        """What a tensor is, by its name and by what the configuration says of its module."""
        slot = parse_tensor_name(name)
        if slot.role == "bias" and name.endswith(".base_layer.bias") and self.config.get("bias", "none") == "none":
            return replace(slot, role="aside")
        if slot.role not in ("saved", "bias"):
            return slot
        # Some programs, and bias="all", write a saved module thrice: under its own name, which PEFT reads, and under
        # both of its wrapper's.
        if _WRAPPED_MODULE.search(slot.module):
            return replace(slot, role="aside")
        # PEFT wraps the modules whose names end so, and saves everything below them, biases too.
        own = self.is_lora or name.endswith((".weight", ".bias"))  # other kinds have factors that are not called so
        if self.is_told_to_save(slot.module) or (own and self._is_embedding(slot)):
            return replace(slot, role="saved")
        return slot if slot.role == "bias" else replace(slot, role="unknown")

    def is_told_to_save(self, module: str) -> bool:
        """Whether a module is one of those that the configuration names as trained whole, or lies below one."""
        return any(f"{saved}." in f"{module}." for saved in self.config.get("modules_to_save") or ())

    def _is_embedding(self, slot: Slot) -> bool:
        if self.embeddings is not None:
            return slot.module in self.embeddings
        return slot.role == "saved" and slot.module.rpartition(".")[2] in _EMBEDDINGS

    @cached_property
    def pairs(self) -> dict[str, dict[str, TensorInfo]]:
        """Module name to its ``A`` and ``B`` (either may be missing in a damaged checkpoint)."""
        pairs: dict[str, dict[str, TensorInfo]] = {}
        for name, slot in self.slots.items():
            if slot.role in ("A", "B"):
                pairs.setdefault(slot.module, {})[slot.role] = self.tensors[name]
        return pairs

    @property
    def copies(self) -> dict[str, TensorInfo]:
        """What lies beside the factors of a module, or the rows of its tokens, as its base's own weight, by module;
        PEFT loads it with them."""
        loaded = self.pairs.keys() | {slot.module for slot in self.slots.values() if slot.role == "tokens"}
        return {
            slot.module: self.tensors[name]
            for name, slot in self.slots.items()
            if slot.role == "aside" and name.endswith(".base_layer.weight") and slot.module in loaded
        }

    @property
    def parameters(self) -> int:
        """Number of trained values: what PEFT copied from the base does not count."""
        return sum(math.prod(t.shape) for n, t in self.tensors.items() if self.slots[n].role != "aside")

    @property
    def dtype(self) -> str:
        names = sorted({DTYPE_NAMES.get(t.dtype, t.dtype) for t in self.tensors.values()})
        return "+".join(names)

    @property
    def bytes(self) -> int:
        return sum(t.end - t.start for t in self.tensors.values())

    def digest(self) -> str:
        """Digest of the weights and of the configuration without ``base_model_name_or_path``.

        A base is called one thing on this disk and another on the Hub; the adapter is the same.
        """
        return adapter_digest(self.config, sha256_file(self.weights_path))


def adapter_digest(config: dict[str, Any], weights: str) -> str:
    """The digest of a checkpoint by its configuration and the ``sha256:<hex>`` of its weights."""
    told = {key: value for key, value in config.items() if key != "base_model_name_or_path"}
    canonical = json.dumps({"config": told, "weights": weights}, sort_keys=True, ensure_ascii=False)
    return sha256_bytes(canonical.encode(errors="surrogatepass"))


def find_checkpoint_folder(path: Path) -> Path:
    """The folder that holds ``adapter_config.json``: ``path`` itself, or the only sub-folder that has one.

    ``save_pretrained(selected_adapters=["instruct"])`` writes into ``path/instruct/``, which is such a sub-folder.

    Raises:
        NotFound: ``path`` does not exist.
        Usage: it is a file, or holds several checkpoints.
        Incompatible: it holds no PEFT checkpoint.
    """
    if not path.exists():
        raise NotFound(f"{path} does not exist", hint="give the folder that holds adapter_config.json")
    if not path.is_dir():
        raise Usage(f"{path} is a file", hint="give the folder that holds adapter_config.json")
    if (path / CONFIG).is_file():
        return path
    found, nested = recognise_folder(path, read_header), _nested_checkpoints(path)
    if found and found.kind == "diffusers":  # whose parts lie in folders of their own
        nested = []
    if len(nested) == 1:
        return nested[0]
    if nested:
        names = ", ".join(str(p.relative_to(path)) for p in nested)
        raise Usage(f"{path} holds several checkpoints: {names}", hint=f"name one, for example {nested[-1]}")
    if found:
        raise Incompatible(f"{path} {found.what}", hint=found.hint)
    raise Incompatible(f"{path} holds no PEFT checkpoint", hint=f"a checkpoint is a folder with {CONFIG} and {WEIGHTS}")


def _nested_checkpoints(path: Path) -> list[Path]:
    """The checkpoints one or two folders below, by number and name; links to one, or out of the folder, are none."""
    folders = {config.parent for pattern in (f"*/{CONFIG}", f"*/*/{CONFIG}") for config in path.glob(pattern)}
    own = [folder for folder in folders if folder.resolve() == path.resolve() / folder.relative_to(path)]
    return sorted(own, key=lambda f: [(int(n or 0), t) for n, t in re.findall(r"([0-9]{1,18})|([^0-9]+)", str(f))])


def read_config(folder: Path) -> dict[str, Any]:
    """``adapter_config.json`` as a mapping.

    Raises:
        NotFound, Incompatible: it is missing, or is no PEFT configuration.
    """
    path = folder / CONFIG
    missing, broken = "restore the checkpoint, or remove the version", "restore it from where it came"
    config = read_json(path, missing=missing, broken=broken)
    if "peft_type" not in config:
        if found := recognise_folder(folder, read_header):
            raise Incompatible(f"{folder} {found.what}", hint=found.hint)
        raise Incompatible(
            f"{path} is not a PEFT configuration: it has no peft_type", hint="is this a model, not an adapter?"
        )
    if str(config["peft_type"]).upper() == "LORA":
        check_lora_config(config, path)
    return config


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint's configuration and header.

    Raises:
        NotFound, Incompatible, VerificationFailed: missing, only pickled weights, or damaged.
    """
    config = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        if (folder / "adapter_model.bin").exists():
            raise Incompatible(
                f"{folder} has only adapter_model.bin, a pickle, which can execute code",
                hint="save it again with safe_serialization=True, where it was made",
            )
        if found := recognise_folder(folder, read_header):
            raise Incompatible(f"{folder} {found.what}", hint=found.hint)
        raise Incompatible(f"{folder} has no {WEIGHTS}", hint="give a folder that PEFT's save_pretrained wrote")
    refuse_pointer(folder / WEIGHTS)
    return Checkpoint(folder, config, read_header(folder / WEIGHTS))


def read_info(folder: Path) -> AdapterInfo | None:
    """What a checkpoint says of itself in ``adapter_info.json``; None where there is none that can be read."""
    path = folder / INFO
    try:
        return msgspec.json.decode(read_bounded(path), type=AdapterInfo) if path.is_file() else None
    except (OSError, ValueError, Usage, msgspec.DecodeError, RecursionError):
        return None


TEMPLATE_FILE = "chat_template.jinja"


def own_template(folder: Path) -> str | None:
    """The chat template that lies in a checkpoint's folder, where transformers looks for it."""
    if (file := folder / TEMPLATE_FILE).is_file():
        return read_bounded(file).decode("utf-8-sig", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_json_if_any(folder / name).get("chat_template")
        if isinstance(template, str) and template:
            return template
    return None


def templates_of(checkpoints: Iterable[tuple[str, Path]]) -> list[tuple[str, str]]:
    """The labels and templates of those checkpoints that bring one, the newest first: a stack's last member."""
    found = [(label, own_template(folder)) for label, folder in checkpoints]
    return [(label, template) for label, template in reversed(found) if template]
