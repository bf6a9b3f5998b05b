"""The modules of a base that a LoRA can stand on: their compact notation, and PEFT's rules for choosing them.

A base of 32 layers has hundreds of such modules and a handful of kinds; an entry lists the kinds, with index
ranges: ``model.layers.{0-31}.self_attn.q_proj``. The matching rules are PEFT's
(src/peft/tuners/tuners_utils.py: check_target_module_exists; src/peft/utils/other.py: get_pattern_key).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from stackctl.core.errors import Usage
from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.safe_regex import pattern
from stackctl.lora.target_parameters import EXPERTS, PLAIN, expected_parameters

ALL_LINEAR = "all-linear"
_RANGES = re.compile(r"\{([0-9]{1,9}(?:-[0-9]{1,9})?(?:,[0-9]{1,9}(?:-[0-9]{1,9})?)*)\}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")
_MOST_MODULES = 1_000_000
_Value = TypeVar("_Value")


def compact_modules(modules: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
    """Group modules that differ only in their indices.

    Names with several indices (experts in layers) are grouped when every combination exists with one shape, and
    else stay apart by their first index.
    """
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, shape in modules.items():
        parts = name.split(".")
        indices = tuple(int(part) for part in parts if _INDEX.fullmatch(part))
        pattern = ".".join("{}" if _INDEX.fullmatch(part) else part for part in parts)
        groups.setdefault((pattern, f"{shape.type} {shape.shape}"), []).append(indices)
    compact: dict[str, ModuleShape] = {}
    for (pattern, _), found in groups.items():
        for ranges in _boxes(found):
            name = pattern.format(*("{" + _format_range(r) + "}" if len(r) > 1 else str(r[0]) for r in ranges))
            first = pattern.format(*(str(r[0]) for r in ranges))
            compact[name] = modules[first]
    return compact


def compact_names(names: Iterable[str]) -> list[str]:
    """Names of modules in natural order, those that differ only in their indices as one: ``layers.{0-29}.up_proj``."""
    return list(compact_modules(dict.fromkeys(sorted(names, key=natural_order), ModuleShape(type="Other", shape=[]))))


def _boxes(indices: list[tuple[int, ...]]) -> list[list[list[int]]]:
    """Cover index tuples by full products of index lists."""
    axes = [sorted(set(axis)) for axis in zip(*indices, strict=True)]
    if math.prod(len(axis) for axis in axes) == len(indices):
        return [axes]
    by_first: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in indices:
        by_first.setdefault(first, []).append(tuple(rest))
    return [[[first], *box] for first, rest in by_first.items() for box in _boxes(rest)]


def _format_range(numbers: list[int]) -> str:
    parts = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        values = [value for _, value in run]
        parts.append(str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}")
    return ",".join(parts)


def expand_modules(compact: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
    """Every module by its full name; the inverse of :func:`compact_modules`.

    Raises:
        Usage: so many that no model has them: a few bytes may stand for more than memory holds.
    """
    again = "register the base again: stackctl base rm NAME, then stackctl base add NAME SOURCE"
    return expand_names(compact, "a base's modules", again)


def expand_names(
    compact: Mapping[str, _Value], what: str = "layer_weights", hint: str = "name layers or modules that there are"
) -> dict[str, _Value]:
    """Every name that some with ranges stand for, with what is said of them.

    Raises:
        Usage: so many that no model has them: a few bytes may stand for more than memory holds.
    """
    if sum(map(_count, compact)) > _MOST_MODULES:
        raise Usage(f"the ranges of {what} stand for more than {_MOST_MODULES:,} modules", hint=hint)
    return {
        name: value
        for pattern, value in compact.items()
        for name in _expand(pattern)
    }  # fmt: skip


def _expand(pattern: str) -> Iterable[str]:
    pieces = _RANGES.split(pattern)
    choices = [_parse_range(piece) if odd % 2 else [piece] for odd, piece in enumerate(pieces)]
    return ("".join(combination) for combination in itertools.product(*choices))


def _count(pattern: str) -> int:
    """How many names a pattern stands for, without making them."""
    total = 1
    for text in _RANGES.findall(pattern):
        bounds = (part.partition("-") for part in text.split(","))
        total *= sum(max(0, int(last or first) - int(first) + 1) for first, _, last in bounds)
    return total


def _parse_range(text: str) -> list[str]:
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [str(n) for n in range(int(first), int(last or first) + 1)]
    return numbers


def expected_targets(
    config: Mapping[str, Any], modules: Mapping[str, ModuleShape], output_embedding: str | None
) -> set[str] | None:
    """The modules that PEFT would adapt for a LoRA configuration, or None when the configuration does not say."""
    targets = config.get("target_modules")
    parameters = expected_parameters(config, modules)
    if not targets:
        return parameters or None
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        linear = {name for name, shape in modules.items() if shape.type in ("Linear", "Conv1D")}
        return {name for name in linear - {output_embedding} if not _is_excluded(config, name)} | parameters
    return parameters | {
        name for name, shape in modules.items() if shape.type in PLAIN and is_target(config, name)
    }  # fmt: skip


def named_targets(text: list[str] | str, base: Base) -> set[str]:
    """The modules of a base that a person means by names, a regular expression or all-linear: of experts, their
    parameters too.

    Raises:
        Usage: the regular expression is none.
    """
    asked, modules = parse_targets(text), expand_modules(base.modules)
    experts = {name: ModuleShape(type="Linear", shape=[]) for name, shape in modules.items() if shape.type in EXPERTS}
    try:
        return expected_targets({"target_modules": asked}, {**modules, **experts}, base.output_embedding) or set()
    except re.error as error:
        what = f"target_modules: '{asked}' is not a regular expression ({error})"
        raise Usage(what, hint="correct it, or name modules: q_proj,v_proj") from None


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts the module ``name`` for a configuration whose target_modules are names or one regex."""
    if _is_excluded(config, name):
        return False
    targets = config["target_modules"]
    if isinstance(targets, str):
        return pattern(targets).fullmatch(name)
    if name in targets:  # a full name is meant whatever layers_to_transform says
        return True
    return any(_ends_with(name, target) for target in targets) and _is_in_layers(config, name)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _is_excluded(config: Mapping[str, Any], name: str) -> bool:
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and pattern(excluded).fullmatch(name):
        return True
    if isinstance(excluded, list) and any(_ends_with(name, entry) for entry in excluded):
        return True
    return any(pattern(rf"(^|.*\.){saved}($|\..*)", saved).match(name) for saved in config.get("modules_to_save") or ())


def _is_in_layers(config: Mapping[str, Any], name: str) -> bool:
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or [r"[^.]*"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    for layers_pattern in patterns:
        # The first index is the layer's; a later one may be an expert's. Without a pattern PEFT wants a parent too.
        prefix = r".*?\." if not config.get("layers_pattern") else r"(?:^|.*?\.)"
        if match := pattern(rf"{prefix}{layers_pattern}\.(?P<index>\d+)\.", layers_pattern).match(name):
            index = int(match["index"])
            return index == layers if isinstance(layers, int) else index in layers
    return False


def _pattern_value(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    for key, value in (patterns or {}).items():
        if pattern(rf"(.*\.)?({key})$", key).match(name):
            return value
    return otherwise


def lora_rank(config: Mapping[str, Any], name: str) -> int:
    """The rank that a configuration gives a module."""
    return int(_pattern_value(config.get("rank_pattern"), name, config.get("r", 8)))


def lora_scaling(config: Mapping[str, Any], name: str) -> float:
    """alpha/r, or alpha/√r with rsLoRA (https://arxiv.org/abs/2312.03732), for a module."""
    rank = lora_rank(config, name)
    alpha = float(_pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def natural_order(name: str) -> list[tuple[bool, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(not part.isdigit(), part.zfill(20) if part.isdigit() else part) for part in name.split(".")]


_REGEX_SIGNS = re.compile(r"[\\|()\[\]{}^$*+?]")


def parse_targets(text: list[str] | str) -> list[str] | str:
    """``q_proj,v_proj`` to a list; a regular expression and all-linear stay text."""
    if isinstance(text, list):
        return text
    if text.lower() == ALL_LINEAR:
        return ALL_LINEAR
    return text if _REGEX_SIGNS.search(text) else [part.strip() for part in text.split(",") if part.strip()]
