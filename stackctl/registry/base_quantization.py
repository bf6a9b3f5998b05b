"""The scheme in which a model's weights are stored quantised, by its configuration alone, and what can be done with it.

A scheme is read by transformers itself, into plain weights, or the model is refused: weights that are read by no scheme
are other weights. Which schemes exist is transformers' AUTO_QUANTIZER_MAPPING (transformers/quantizers/auto.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.storage.files import read_json

FOUR_BITS = "bitsandbytes_4bit"
READ = {"fp8": "FP8", "mxfp8": "MXFP8", "mxfp4": "MXFP4", FOUR_BITS: "bitsandbytes in 4 bits"}
"""The schemes that transformers turns into plain weights without a kernel or a package of their own."""

_REFUSED = {
    "bitsandbytes_8bit": ("bitsandbytes in 8 bits", "its layers quantise what goes through them, too"),
    "gptq": ("GPTQ", ""),
    "awq": ("AWQ", ""),
    "compressed-tensors": ("compressed-tensors", ""),
    "auto-round": ("AutoRound", ""),
    "modelopt": ("NVIDIA ModelOpt", ""),
    "nvfp4": ("NVFP4", ""),
    "mlx": ("MLX", ""),
    "hqq": ("HQQ", ""),
    "aqlm": ("AQLM", ""),
    "gguf": ("GGUF", ""),
    "torchao": ("torchao", ""),
    "quanto": ("quanto", ""),
}
"""Schemes that have a name of their own, and a reason where it is another one than that of all."""

_PLACES = ("", "text_config", "llm_config", "thinker_config")
KEYS = ("quantization_config", "compression_config", "quantization")
"""Where configurations keep a scheme."""
_SUFFIX = re.compile(
    r"[-_.](?:"
    r"(?:unsloth[-_])?bnb[-_]?(?:4|8)bits?|(?:bnb|nf4|fp4|int[48]|w[0-9]+a[0-9]+|(?:4|8)[-_]?bits?)"
    r"|(?:fp8|mxfp8|mxfp4|nvfp4)(?:[-_](?:dynamic|static|block|kv|tensorwise|hybrid))*"
    r"|(?:awq|gptq|autoround|auto[-_]round)(?:[-_](?:int[48]|w[0-9]+a[0-9]+|marlin|gemm|[0-9]+bits?|[0-9]+g|sym|asym))*"
    r"|(?:hqq|eetq|aqlm|quanto|quark|higgs|vptq|spqr|exl[23]|mlx|modelopt|quantized|quantised|qat)"
    r")$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Quantization:
    """How a model's weights are stored: ``method`` is transformers' word, ``settings`` what the configuration says."""

    method: str
    settings: Mapping[str, Any]

    @property
    def is_read(self) -> bool:
        """Whether transformers turns it into plain weights on any machine."""
        return self.method in READ

    @property
    def label(self) -> str:
        """What it is called in print."""
        return READ.get(self.method) or _REFUSED.get(self.method, (f"the scheme '{self.method[:40]}'", ""))[0]

    @property
    def why_refused(self) -> str:
        """Why it is not read, where there is more to say than that it is not."""
        return _REFUSED.get(self.method, ("", ""))[1]


def quantization_of(config: Mapping[str, Any]) -> Quantization | None:
    """The scheme that a ``config.json`` names, for the whole model or for its text part; None for plain weights.

    What is quantised without naming a method is MLX's, which writes ``{"bits": 4, "group_size": 64}``.
    """
    for place in _PLACES:
        part = config.get(place) if place else config
        for key in KEYS:
            settings = part.get(key) if isinstance(part, Mapping) else None
            empty = not settings and (place or key != "quantization_config")  # which transformers refuses, too
            if not isinstance(settings, Mapping) or empty:
                continue
            for bits in ("4bit", "8bit"):  # as transformers tells them apart, whatever quant_method says
                if settings.get(f"load_in_{bits}"):
                    return Quantization(f"bitsandbytes_{bits}", settings)
            method = settings.get("quant_method")
            if method is None:
                method = "mlx" if "bits" in settings and "group_size" in settings else f"{key} without quant_method"
            return Quantization(str(method).lower(), settings)
    return None


def stored_scheme(folder: Path) -> Quantization | None:
    """The scheme of a model folder."""
    return quantization_of(read_json(folder / "config.json"))


def plain_name(source: str) -> str | None:
    """``org/model-FP8`` to ``org/model``: where the plain model most likely is; None where the name does not say."""
    plain = source
    while plain and (shorter := _SUFFIX.sub("", plain)) != plain:
        plain = shorter
    return plain if plain and plain != source else None
