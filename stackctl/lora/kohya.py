"""A LoRA in one file, as kohya's sd-scripts and LyCORIS write it, on a language model: a table of names.

sd-scripts (networks/lora.py, lora_lumina.py: LoRANetwork, whose text encoder is a Gemma 2) and LyCORIS
(lycoris/wrapper.py) call a module by a prefix and its path in the model, with ``_`` for each dot, so that only the
model tells which module is meant. ``lora_down.weight`` is A (r, in), ``lora_up.weight`` B (out, r), and ``alpha`` a
number for the module, which is its rank where there is none or where it is zero. The path begins at the decoder, or at
the whole model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, StackctlError, listed_problems
from stackctl.core.schema import Base
from stackctl.lora.checkpoint import CONFIG
from stackctl.lora.lora_config import PEFT_PREFIX, factor_names, plain_lora_config
from stackctl.lora.recognition import KOHYA
from stackctl.lora.safetensors_header import DTYPE_NAMES, TensorInfo, read_header
from stackctl.lora.target_modules import expand_modules
from stackctl.lora.target_parameters import is_parameter_only

_NAME = re.compile(r"(?:lora_te[0-9]?|lycoris)_(?P<path>[^.]+)\.(?P<part>.+)")
_IMAGE = re.compile(r"lora_unet_|lora_te[0-9]?_(text_model_|encoder_block_)")
"""Of an image model itself, and of the CLIP and the T5 that read its prompts."""
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
_OTHER_KINDS = {"hada_": "LoHa", "lokr_": "LoKr", "dora_scale": "DoRA", "oft_": "OFT", "on_input": "IA3"}


@dataclass(frozen=True)
class KohyaAdapter:
    """A file of sd-scripts' or LyCORIS'. ``tensors`` maps a base's module to where ``A``, ``B`` and ``alpha`` lie."""

    path: Path
    base: Base
    tensors: dict[str, dict[str, TensorInfo]]

    def peft_config(self, alphas: Mapping[str, float]) -> dict[str, Any]:
        """PEFT's configuration of the same adapter; ``alphas`` are the numbers in the file, by module."""
        ranks = {module: parts["A"].shape[0] for module, parts in self.tensors.items()}
        told = {module: alphas.get(module) or float(rank) for module, rank in ranks.items()}
        values = list(told.values())
        common = max(dict.fromkeys(values), key=values.count)
        return {
            **plain_lora_config(ranks, {}),
            "lora_alpha": common,
            "alpha_pattern": {re.escape(module): alpha for module, alpha in told.items() if alpha != common},
            "base_model_name_or_path": self.base.hub_id or self.base.source,
            "inference_mode": True,
        }

    def peft_tensors(self) -> dict[str, tuple[TensorInfo, bool]]:
        """The tensors by PEFT's names, and whether each lies the other way round, as none does."""
        made = {}
        for module, parts in self.tensors.items():
            for name, part in zip(factor_names(f"{PEFT_PREFIX}{module}", "Linear"), "AB", strict=True):
                made[name] = parts[part], False
        return made


def find_kohya(path: Path) -> Path | None:
    """The file of such an adapter: ``path`` itself, or the only one in a folder that is no checkpoint of PEFT's."""
    files = [path] if path.is_file() and path.suffix == ".safetensors" else []
    if path.is_dir() and not (path / CONFIG).is_file():
        files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        return None
    try:
        names = read_header(files[0])
    except (StackctlError, OSError):
        return None
    return files[0] if any(_NAME.fullmatch(name) or name.startswith("lora_unet_") for name in names) else None


def read_kohya(path: Path, base: Base) -> KohyaAdapter:
    """An adapter by its header, its names resolved on a base.

    Raises:
        Incompatible: it is an image model's, or it does not fit, with everything that stands in the way.
        VerificationFailed: the file is damaged.
    """
    header = read_header(path)
    if any(_IMAGE.match(name) for name in header):
        raise Incompatible(f"{path} {KOHYA.what}", hint=KOHYA.hint)
    paths, tensors, problems = _paths(base), dict[str, dict[str, TensorInfo]](), list[str]()
    for name, info in header.items():
        match = _NAME.fullmatch(name)
        modules = paths.get(match["path"], []) if match else []
        if why := _not_taken(match, info, modules, base):
            problems.append(f"'{name[:80]}' {why}")
        elif match:
            tensors.setdefault(modules[0], {})[_PARTS[match["part"]]] = info
    for module, parts in tensors.items():
        if absent := sorted({"A": "lora_down", "B": "lora_up"}[part] for part in {"A", "B"} - set(parts)):
            problems.append(f"{module} has no {' and no '.join(absent)}")
    if problems or not tensors:
        raise Incompatible(
            f"{path} is not a LoRA for {base.name}: {listed_problems(problems) or 'it holds no tensors'}",
            hint="name the model that it was trained on: --base B",
        )
    return KohyaAdapter(path, base, tensors)


def _not_taken(match: re.Match[str] | None, info: TensorInfo, modules: list[str], base: Base) -> str | None:
    """Why a tensor is none of a plain LoRA on a base."""
    if match is None:
        return "is not a tensor of a LoRA on a language model"
    part = match["part"]
    if kind := next((kind for start, kind in _OTHER_KINDS.items() if part.startswith(start)), None):
        return f"is a part of {kind}, which is not a plain LoRA"
    if part not in _PARTS:
        return "is not part of a plain LoRA"
    if len(modules) != 1:
        return f"may be {' or '.join(modules)}" if modules else f"stands on no linear layer of {base.name}"
    fits = math.prod(info.shape) == 1 if part == "alpha" else len(info.shape) == 2
    is_number = info.dtype in DTYPE_NAMES or (part == "alpha" and info.dtype in ("I32", "I64"))
    return None if fits and is_number else f"is {info.dtype} {list(info.shape)}"


def _paths(base: Base) -> dict[str, list[str]]:
    """The linear layers of a base by what they are called with ``_`` for each dot, from its decoder and as a whole."""
    decoder = f"{(base.input_embedding or '').rpartition('.')[0]}."
    found: dict[str, list[str]] = {}
    for name, shape in expand_modules(base.modules).items():
        if shape.type in ("Linear", "Conv1D") and not is_parameter_only(name, shape.type, base.converted_names):
            for path in dict.fromkeys((name, name.removeprefix(decoder))):
                found.setdefault(path.replace(".", "_"), []).append(name)
    return found
