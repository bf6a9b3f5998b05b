"""LoRA on parameters instead of modules: the experts of a mixture, and weights that no plain linear layer applies.

PEFT (src/peft/tuners/lora/layer.py: ParamWrapper) puts a wrapper around the module that holds a parameter, and another
around that one for the next parameter of the same module. A checkpoint's names say only how deep a wrapper lies:
``experts.base_layer.lora_A.weight`` belongs to the parameter that was wrapped first, ``experts.lora_A.weight`` to the
last. They are wrapped in the order in which the module declares them.

Factors of a parameter with E matrices hold all of them, A (E · rank, in) with an expert's rows together and B (out,
rank · E) with an expert's columns E apart.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from stackctl.core.schema import ModuleShape
from stackctl.lora.safetensors_header import TensorInfo

EXPERTS = ("Experts", "TransposedExperts")
"""Kinds of parameters with a matrix for each expert, shape (experts, out, in) of the delta."""
PLAIN = ("Linear", "Conv1D", "Embedding")
"""Kinds of modules that a LoRA stands on as a module."""
_WRAPPED = ".base_layer"

Pairs = dict[str, dict[str, TensorInfo]]

CONVERTED_NAMES: dict[str, tuple[str, ...]] = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("down_proj", "gate", "gate_proj", "up_proj"),
}
"""Names of linear layers that PEFT takes for experts of a mixture as transformers 4 had them, by the conversion that
transformers has for a model type (src/peft/utils/transformers_weight_conversion.py: _MOE_TARGET_MODULE_MAPPING). It
turns them into parameters wherever they stand in ``target_modules``, so that a layer of that name gets nothing."""


def parameter_of(name: str, shape: ModuleShape) -> str:
    """The full name of the parameter that a delta is added to."""
    return name if shape.type in (*EXPERTS, "Parameter") else f"{name}.weight"


def pattern_name(config: Mapping[str, Any], name: str, shape: ModuleShape | None) -> str:
    """The name that ``rank_pattern`` and ``alpha_pattern`` are held against: that of what PEFT wrapped."""
    parameter = parameter_of(name, shape) if shape else name
    return parameter if is_parameter_target(config.get("target_parameters") or (), parameter) else name


def is_turned(config: Mapping[str, Any], name: str, shape: ModuleShape) -> bool:
    """Whether PEFT adapts the weight of a module whose delta, (out, in), lies there the other way round."""
    targets = config.get("target_parameters") or ()
    return shape.type in ("Embedding", "Conv1D") and is_parameter_target(targets, parameter_of(name, shape))


def expected_parameters(config: Mapping[str, Any], modules: Mapping[str, ModuleShape]) -> set[str]:
    """What a configuration's ``target_parameters`` choose (src/peft/tuners/tuners_utils.py: _inject_parameters)."""
    targets = config.get("target_parameters") or ()
    return {name for name, shape in modules.items() if is_parameter_target(targets, parameter_of(name, shape))}


def is_parameter_target(targets: Collection[str], parameter: str) -> bool:
    return any(parameter == target or parameter.endswith(f".{target}") for target in targets)


def place_pairs(pairs: Pairs, config: Mapping[str, Any], known: Mapping[str, ModuleShape] | None) -> Pairs:
    """A checkpoint's factors by what they stand on in a base, instead of by the wrappers that PEFT put around it.

    What cannot be placed keeps its name.
    """
    if not config.get("target_parameters") or known is None:
        return pairs
    expected = expected_parameters(config, known)
    held = _by_holder([name for name in expected if known[name].type in (*EXPERTS, "Parameter")], known)
    placed: Pairs = {}
    for name, pair in pairs.items():
        holder = without_wrappers(name)
        depth, names = name.removeprefix(holder).count(_WRAPPED), held.get(holder, [])
        placed[names[-1 - depth] if depth < len(names) else name] = pair
    return placed


def without_wrappers(module: str) -> str:
    """A module's name without those of the wrappers that PEFT puts around one whose parameters it adapts."""
    while module.endswith(_WRAPPED):
        module = module.removesuffix(_WRAPPED)
    return module


def _by_holder(parameters: Iterable[str], known: Mapping[str, ModuleShape]) -> dict[str, list[str]]:
    """Parameters by the modules that hold them, in the order in which those declare them."""
    order = {name: place for place, name in enumerate(known)}
    held: dict[str, list[str]] = {}
    for name in sorted(parameters, key=order.__getitem__):
        held.setdefault(name.rpartition(".")[0], []).append(name)
    return held


def is_parameter_only(name: str, kind: str, converted_names: Collection[str]) -> bool:
    """Whether PEFT can adapt something of a kind (``ModuleShape.type``) as a parameter alone."""
    return kind in (*EXPERTS, "Matrix") or name.rpartition(".")[2] in converted_names


def wrapped_names(parameters: Collection[str], known: Mapping[str, ModuleShape]) -> dict[str, str]:
    """The inverse of :func:`place_pairs`: experts to the wrapper's name, for all that an adapter stands on."""
    held = _by_holder([name for name in parameters if known[name].type in EXPERTS], known)
    return {
        name: holder + _WRAPPED * (len(names) - 1 - place)
        for holder, names in held.items()
        for place, name in enumerate(names)
    }


def shortest_suffixes(chosen: Collection[str], every: Collection[str]) -> list[str]:
    """The shortest ends of names, cut at dots, that match all of ``chosen`` and nothing else of ``every``."""
    others = {suffix for name in every if name not in chosen for suffix in _suffixes(name)}
    return sorted({next((s for s in _suffixes(name) if s not in others), name) for name in chosen})


def _suffixes(name: str) -> list[str]:
    """``a.b.c``: ``c``, ``b.c``, ``a.b.c``."""
    parts = name.split(".")
    return [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
