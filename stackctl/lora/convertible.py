"""Adapters that are no plain LoRA and can be made one, by their configuration: names only, no tensors.

A type of PEFT's is convertible when its layers merge into the weights of linear layers (or embeddings): what merging
changes is a delta, whatever made it. Not convertible is what depends on the input, adds tokens or changes norms alone.
Of LoRA itself, the variants whose effect is no product of their factors, and the ways to begin that changed the base.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONVERTIBLE_TYPES = frozenset((
    "ADALORA", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LOHA",
    "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
    "UNILORA", "VBLORA", "VERA", "WAVEFT",
))  # fmt: skip
"""PEFT's types (src/peft/utils/peft_types.py) that can be made a plain LoRA."""

_VARIANTS = {
    "use_dora": "DORA", "use_qalora": "QALORA", "use_bdlora": "BDLORA", "kasa_config": "KASA", "lora_bias": "LORA_BIAS",
}  # fmt: skip
"""Options of a LoRA that make it another thing, and what that is called."""

_IN_THE_WAY = (
    "alora_invocation_tokens", "arrow_config", "layer_replication", "monteclora_config", "target_parameters",
    "trainable_token_indices",
)  # fmt: skip
"""Options of a LoRA beside which nothing is converted."""

CONVERTED_CODES = frozenset((*_VARIANTS, "changed_base"))
"""The codes of the refusals (:mod:`stackctl.plan.refusals`) that conversion does away with."""

KNOWN_RESIDUALS = {"pissa": "PISSA", "olora": "OLORA"}
"""Ways to begin that took a product of factors out of the base which follows from the base alone. PiSSA's fast form
(``pissa_niter_4``) draws at random, and CorDA and LoRA-GA follow from data."""
_TOLD_RESIDUALS = {"pissa_niter": "PISSA", "corda": "CORDA", "lora_ga": "LORA_GA"}
"""Those of which only the adapter as it was before its training can tell."""


def variant_of(config: Mapping[str, Any]) -> str | None:
    """The variant that a LoRA is by an option, which PEFT merges and whose effect is not that of its factors."""
    return next((name for key, name in _VARIANTS.items() if config.get(key)), None)


def beginning_of(config: Mapping[str, Any]) -> str:
    """How a LoRA was initialised, in small letters: ``true``, ``pissa``, …"""
    return str(config.get("init_lora_weights", True)).lower()


def changed_beginning(config: Mapping[str, Any]) -> str | None:
    """The name of the beginning that changed the base, where an adapter can be made a plain LoRA all the same."""
    begun = beginning_of(config)
    told = (name for key, name in _TOLD_RESIDUALS.items() if begun.startswith(key))
    return KNOWN_RESIDUALS.get(begun) or next(told, None)


def needs_initial(config: Mapping[str, Any]) -> bool:
    """Whether what was taken out of the base is known only by the adapter as it was before its training."""
    return changed_beginning(config) is not None and beginning_of(config) not in KNOWN_RESIDUALS


def kind_of(config: Mapping[str, Any]) -> str | None:
    """What an adapter is that is no plain LoRA and can be made one: ``LOHA``, ``DORA``, ``PISSA``; else None."""
    peft_type = str(config.get("peft_type", "")).upper()
    if peft_type != "LORA":
        return peft_type if peft_type in CONVERTIBLE_TYPES else None
    if any(config.get(key) for key in _IN_THE_WAY):
        return None
    return variant_of(config) or changed_beginning(config)


def convert_hint(config: Mapping[str, Any], name: str, path: Path) -> str | None:
    """The command that makes a plain LoRA of an adapter; None where there is none."""
    if kind_of(config) is None:
        return None
    initial = " --initial FOLDER, the adapter as it was before its training" if needs_initial(config) else ""
    return f"make a plain LoRA of it: {shlex.join(['stackctl', 'add', name, str(path), '--convert'])}{initial}"
