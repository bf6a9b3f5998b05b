"""The keys of PEFT's LoraConfig (src/peft/tuners/lora/config.py) that stackctl reads, checks and writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from stackctl.core.errors import Incompatible
from stackctl.core.fields import Finite
from stackctl.core.schema import Lora

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""
_Rank = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
_Token = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class _LoraConfig(msgspec.Struct):
    """The keys of PEFT's LoraConfig that decide what its tensors mean, by their types."""

    r: _Rank = 8
    lora_alpha: Finite = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, Finite] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool | None = False
    use_dora: bool | None = False
    trainable_token_indices: list[_Token] | dict[str, list[_Token]] | None = None

    @property
    def expressions(self) -> list[str]:
        """Everything that PEFT uses as a regular expression."""
        texts = [t for t in (self.target_modules, self.exclude_modules, self.layers_pattern) if isinstance(t, str)]
        lists = (self.modules_to_save, self.layers_pattern, self.rank_pattern, self.alpha_pattern)
        return texts + [text for found in lists if found and not isinstance(found, str) for text in found]


def check_lora_config(config: dict[str, Any], path: Path) -> None:
    """Raises: Incompatible: a key has a value of another type than PEFT's, or one that is no regular expression."""
    hint = "correct it, or restore the checkpoint from where it was made"
    try:
        typed = msgspec.convert(config, _LoraConfig, strict=True)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:  # the latter for half a character
        raise Incompatible(f"{path}: {error}", hint=hint) from None
    for text in typed.expressions:
        try:
            re.compile(f"({text})")
        except (re.error, OverflowError, RecursionError):
            raise Incompatible(f"{path}: '{text[:80]}' is not a regular expression", hint=hint) from None


def describe_lora(config: dict[str, Any]) -> Lora:
    """The part of a PEFT configuration that a registry entry repeats."""
    told = {name: config[name] for name in Lora.__struct_fields__ if config.get(name) is not None}
    return msgspec.convert({"r": _LoraConfig().r, "lora_alpha": _LoraConfig().lora_alpha} | told, Lora, strict=False)


def factor_names(name: str, kind: str) -> tuple[str, str]:
    """What PEFT calls the tensors of A and B of a module of a kind (``ModuleShape.type``)."""
    if kind == "Embedding":
        return f"{name}.lora_embedding_A", f"{name}.lora_embedding_B"
    return f"{name}.lora_A.weight", f"{name}.lora_B.weight"


def plain_lora_config(modules: dict[str, int], parameters: dict[str, int]) -> dict[str, Any]:
    """PEFT's configuration of one plain LoRA with these ranks: alpha = rank on every module, so that scaling is one.

    ``parameters`` are those that are adapted as such, by their full names. No rsLoRA, no DoRA, no bias, no dropout:
    what every reader of PEFT's format understands alike.
    """
    ranks = modules | parameters
    rank = max(ranks.values(), default=1)
    other = {re.escape(name): value for name, value in ranks.items() if value != rank}
    on_parameters = {"target_parameters": sorted(parameters)} if parameters else {}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": dict(other),
        "target_modules": sorted(modules) or None,
        **on_parameters,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
    }
