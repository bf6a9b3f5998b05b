"""An adapter of mlx-lm by its configuration and header, and the PEFT configuration that means the same.

mlx-lm (mlx_lm/tuner/lora.py, dora.py, utils.py) keeps ``adapters.safetensors`` beside an ``adapter_config.json`` with
``lora_parameters``. A layer computes ``y + scale · (x @ lora_a) @ lora_b`` with lora_a (in, r) and lora_b (r, out):
PEFT's factors the other way round, and a scale that is no alpha/r. Its modules are called as transformers calls them,
but for the way to the decoder, which :mod:`stackctl.lora.naming` finds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, listed_problems
from stackctl.lora.checkpoint import CONFIG
from stackctl.lora.lora_config import PEFT_PREFIX, factor_names, plain_lora_config
from stackctl.lora.safetensors_header import DTYPE_NAMES, TensorInfo, read_header
from stackctl.storage.files import read_json_if_any

MLX_WEIGHTS = "adapters.safetensors"
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in")
_PARTS = ("lora_a", "lora_b", "m")


@dataclass(frozen=True)
class MlxAdapter:
    """A folder of mlx-lm's. ``tensors`` maps a module and ``lora_a``, ``lora_b`` or ``m`` to where that lies."""

    path: Path
    rank: int
    scale: float
    is_dora: bool
    model: str | None
    tensors: dict[str, dict[str, TensorInfo]]

    def peft_config(self) -> dict[str, Any]:
        """PEFT's configuration of the same adapter."""
        config = plain_lora_config(dict.fromkeys(self.tensors, self.rank), {})
        alpha = {"lora_alpha": peft_alpha(self.scale, self.rank), "use_dora": self.is_dora}
        return {**config, **alpha, "base_model_name_or_path": self.model, "inference_mode": True}

    def peft_tensors(self) -> dict[str, tuple[TensorInfo, bool]]:
        """The tensors by PEFT's names, and whether each lies the other way round there."""
        made = {}
        for module, parts in self.tensors.items():
            kind = "Embedding" if is_embedding(module) else "Linear"
            names = dict(zip(("lora_a", "lora_b"), factor_names(f"{PEFT_PREFIX}{module}", kind), strict=True))
            for part, info in parts.items():
                name = names.get(part, f"{PEFT_PREFIX}{module}.lora_magnitude_vector")
                made[name] = info, part != "m"
        return made


def is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in _EMBEDDINGS


def peft_alpha(scale: float, rank: int) -> float:
    """The alpha for a scale: one that divided by the rank is the scale to the last bit, where there is one."""
    alpha = scale * rank
    near = (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf))
    return next((a for a in near if a / rank == scale), alpha)


def is_mlx(path: Path) -> bool:
    """Whether a folder holds an adapter of mlx-lm, and none of PEFT."""
    if not (path / MLX_WEIGHTS).is_file() or not (path / CONFIG).is_file():
        return False
    config = read_json_if_any(path / CONFIG)
    return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def read_mlx(path: Path) -> MlxAdapter:
    """An adapter of mlx-lm, by its configuration and header.

    Raises:
        Incompatible: it is none that can be read, with everything that stands in the way.
        VerificationFailed: its file is damaged.
    """
    config = read_json_if_any(path / CONFIG)
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise Incompatible(
            f"{path} holds whole weights (mlx-lm's fine_tune_type {str(kind)[:20]}), not a LoRA",
            hint="fuse it (mlx_lm.fuse), then: stackctl extract NAME --base B --tuned FOLDER",
        )
    told = config.get("lora_parameters")
    told = told if isinstance(told, dict) else {}
    problems, rank, scale = list[str](), told.get("rank"), told.get("scale")
    if type(rank) is not int or not 1 <= rank <= 2**31 - 1:
        problems.append("its lora_parameters have no rank")
        rank = 1
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale):
        problems.append("its lora_parameters have no scale that is a number")
        scale = 1.0
    tensors = _tensors(path / MLX_WEIGHTS, kind, rank, problems)
    if problems:
        raise Incompatible(
            f"{path} is not an adapter of mlx-lm that can be read: {listed_problems(problems)}",
            hint="save it again with mlx_lm.lora where it was made",
        )
    model = config.get("model")
    return MlxAdapter(path, rank, float(scale), kind == "dora", model if isinstance(model, str) else None, tensors)


def _tensors(weights: Path, kind: str, rank: int, problems: list[str]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of an adapter by modules and parts; what is odd about them is added to the problems."""
    tensors: dict[str, dict[str, TensorInfo]] = {}
    for name, info in read_header(weights).items():
        module, _, part = name.rpartition(".")
        if part not in _PARTS or (part == "m") > (kind == "dora"):
            problems.append(f"'{name[:80]}' is not a tensor of a {kind}")
        elif len(info.shape) == 3:
            problems.append(f"'{name[:80]}' adapts experts, whose layers mlx-lm lays out otherwise")
        elif info.dtype not in DTYPE_NAMES:
            problems.append(f"'{name[:80]}' is not a floating-point tensor")
        elif part != "m" and (len(info.shape) != 2 or info.shape[part == "lora_a"] != rank):
            problems.append(f"'{name[:80]}' is {list(info.shape)}, and the rank is {rank}")
        else:
            tensors.setdefault(module, {})[part] = info
    wanted = {"lora_a", "lora_b"} | ({"m"} if kind == "dora" else set())
    for module, own in tensors.items():
        if missing := sorted(wanted - own.keys()):
            problems.append(f"{module} has no {', '.join(missing)}")
    if not tensors and not problems:
        problems.append("it holds no tensors")
    return tensors
