"""What a folder, a configuration or a set of tensors is that is no LoRA for a causal language model: by its own name.

Names only, as other programs write them; nothing is loaded. Sources: diffusers
(src/diffusers/loaders/lora_base.py), kohya-ss/sd-scripts (networks/lora.py), adapters
(src/adapters/loading.py: AdapterLoader), mlx-lm (mlx_lm/tuner/utils.py), llama.cpp (convert_lora_to_gguf.py),
git-lfs (docs/spec.md), PEFT 0.2 (tuners/lora.py: MergedLinear).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, StackctlError
from stackctl.storage.files import read_json_if_any

CAUSAL = "only LoRA adapters of causal language models can be registered"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Recognised:
    """What was found instead of a PEFT LoRA for a causal language model, as "is …", and what to do."""

    kind: str
    what: str
    hint: str = CAUSAL


MLX = Recognised(
    "mlx", "is an adapter of mlx-lm, which names and lays out its tensors in another way than PEFT",
    "a folder with adapters.safetensors and adapter_config.json is read as it is: stackctl add NAME FOLDER",
)  # fmt: skip
_DIFFUSERS = Recognised("diffusers", "is a LoRA for an image or video model of diffusers")
KOHYA = Recognised("kohya", "is a LoRA for an image model, as kohya's sd-scripts write it")
_ADAPTERHUB = Recognised("adapterhub", "is an adapter of AdapterHub's library adapters, not of PEFT")
_GGUF = Recognised(
    "gguf_adapter", "holds an adapter as GGUF, which llama.cpp reads", "give the PEFT checkpoint that it was made from"
)
_LFS = Recognised(
    "git_lfs", "is a git-lfs pointer, not the file that it points to", "fetch the weights: git lfs pull, in that folder"
)

_TASKS = {
    "SEQ_CLS": "classifies texts (task_type SEQ_CLS)",
    "TOKEN_CLS": "classifies tokens (task_type TOKEN_CLS)",
    "QUESTION_ANS": "marks answers in a text (task_type QUESTION_ANS)",
}
_CLASSIFIER = re.compile(r"(?:^|\.)(score|classifier|classification_head|qa_outputs|v_head|reward_head)(?:\.|$)")
_IMAGE = re.compile(r"(?:^|[._])(unet|text_encoder(?:_2)?|down_blocks|up_blocks|transformer_blocks|te1?2?)(?:[._]|$)")
_T5 = re.compile(r"(?:^|\.)(?:encoder|decoder)\.block\.[0-9]+\.layer\.")
_ENCODER_DECODER = re.compile(r"(?:^|\.)(?:encoder_attn|EncDecAttention)(?:\.|$)|^(?:model\.)?encoder\.layers\.")


def refuse_pointer(path: Path) -> None:
    """Refuse a file that git-lfs left as a pointer.

    Raises:
        Incompatible: it is one.
    """
    with path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise Incompatible(f"{path} {_LFS.what}", hint=_LFS.hint)


def recognise_folder(folder: Path, names: Callable[[Path], Iterable[str]]) -> Recognised | None:
    """What a folder holds that is no PEFT checkpoint, as far as is known.

    Args:
        names: gives the names of the tensors in a safetensors file.
    """
    if found := _recognise_config(read_json_if_any(folder / "adapter_config.json")):
        return found
    if (folder / "adapters.safetensors").is_file() or (folder / "adapters.npz").is_file():
        return MLX
    if (folder / "pytorch_adapter.bin").exists() or (folder / "head_config.json").is_file():
        return _ADAPTERHUB
    if (folder / "pytorch_lora_weights.safetensors").exists() or (folder / "pytorch_lora_weights.bin").exists():
        return _DIFFUSERS
    if (folder / "unet" / "adapter_config.json").is_file() or (folder / "model_index.json").is_file():
        return _DIFFUSERS
    for path in sorted(folder.glob("*.safetensors"))[:4]:
        try:
            refuse_pointer(path)
            if found := _recognise_tensors(names(path)):
                return found
        except Incompatible:
            return _LFS
        except (StackctlError, OSError):
            continue
    return _GGUF if any(folder.glob("*.gguf")) else None


def _recognise_config(config: Mapping[str, Any]) -> Recognised | None:
    """What an ``adapter_config.json`` without ``peft_type`` was written by."""
    if config.get("peft_type"):
        return None
    if "lora_parameters" in config or ("fine_tune_type" in config and "num_layers" in config):
        return MLX
    if isinstance(config.get("config"), (dict, str)) and ("model_class" in config or "model_type" in config):
        return _ADAPTERHUB
    return None


def _recognise_tensors(names: Iterable[str]) -> Recognised | None:
    """What other programs' tensors belong to, by their names."""
    for name in names:
        if name.startswith(("lora_unet_", "lora_te")) or ".lora_down." in name:
            return KOHYA
        if name.startswith(("unet.", "text_encoder.", "text_encoder_2.", "transformer.transformer_blocks.")):
            return _DIFFUSERS
        if name.endswith((".lora_a", ".lora_b")):
            return MLX
    return None


def recognise_task(config: Mapping[str, Any], tensors: Iterable[str]) -> Recognised | None:
    """What a PEFT checkpoint does, if it is not to write text: by its configuration and the heads that it trained."""
    task = _TASKS.get(str(config.get("task_type") or "").upper())
    saved = [name for name in tensors if "lora_" not in name]
    head = next((match[1] for name in saved if (match := _CLASSIFIER.search(name))), None)
    if task is None and head is None:
        return None
    with_head = f", with a head of its own ('{head}')" if head else ""
    return Recognised(
        "classifier", (task or "is a classifier") + with_head, "use it with transformers' class for its task; " + CAUSAL
    )


def recognise_model(config: Mapping[str, Any], modules: Iterable[str]) -> Recognised | None:
    """What kind of model a PEFT checkpoint belongs to, where that is none which writes text alone.

    Asked when its modules do not fit a base, for the true reason: decoders alone have ``model.decoder.layers`` as well.
    """
    mapping = config.get("auto_mapping")
    told = mapping if isinstance(mapping, dict) else {}
    its_class = str(told.get("base_model_class") or "")
    library = str(told.get("parent_library") or "")
    base = str(config.get("base_model_name_or_path") or "").lower()
    if library.startswith("diffusers"):
        return Recognised("diffusers", f"is a LoRA for {its_class[:60] or 'a model'} of diffusers")
    names = list(modules)
    if "whisper" in its_class.lower() or ("whisper" in base and any("decoder" in name for name in names)):
        return Recognised("whisper", "is an adapter of Whisper, which turns speech into text")
    if its_class.startswith(("T5", "MT5", "UMT5", "LongT5", "SwitchTransformers")) or any(map(_T5.search, names)):
        return Recognised("t5", "is an adapter of T5 or its kin, an encoder with a decoder")
    if str(config.get("task_type") or "").upper() == "SEQ_2_SEQ_LM":
        return Recognised("seq2seq", "is for an encoder with a decoder (task_type SEQ_2_SEQ_LM)")
    if any(map(_ENCODER_DECODER.search, names)):
        return Recognised("seq2seq", "is for an encoder with a decoder")
    if any(map(_IMAGE.search, names)):
        return _DIFFUSERS
    if str(config.get("task_type") or "").upper() == "FEATURE_EXTRACTION":
        return Recognised("embedding", "makes vectors of texts (task_type FEATURE_EXTRACTION)")
    return None


def trains_parts_of_fused_layers(config: Mapping[str, Any]) -> bool:
    """Whether it was saved by a PEFT older than 0.3 as MergedLinear: ``enable_lora`` says which parts were adapted."""
    parts = config.get("enable_lora")
    return bool(parts) and (not isinstance(parts, list) or any(parts))
