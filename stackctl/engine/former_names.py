"""What the modules of a model were called in files of earlier transformers: its conversion mapping, the other way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
)

from stackctl.core.schema import ModuleShape
from stackctl.lora.target_parameters import parameter_of

_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def former_names(model: PreTrainedModel, modules: Mapping[str, ModuleShape]) -> dict[str, list[str]]:
    """Modules to their former names, both with ``*`` for each number; of experts stacked in one parameter, the former
    names of the parts of a matrix, with a last ``*`` for the expert. What kept its name is left out.

    Parts are those that are concatenated, each expert's rows one below the other; what was laid out otherwise has no
    former name.
    """
    conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    renamings = [r for c in reversed(conversions) if isinstance(r := _reversed(c), WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    found: dict[str, list[str]] = {}
    for name, shape in modules.items():
        parameter = parameter_of(name, shape)
        if shape.type == "Experts":
            former = [apply_renamings(part, renamings) for part in _parts(parameter, converters)]
        else:
            former = [apply_renamings(parameter, renamings)]
        if former and former != [parameter]:
            found[_INDEX.sub("*", name)] = [_INDEX.sub("*", part.removesuffix(".weight")) for part in former]
    return found


def _reversed(conversion: WeightTransform) -> WeightTransform | None:
    try:
        return conversion.reverse_transform()
    except (ValueError, NotImplementedError, AttributeError):  # some operations have no way back
        return None


def _parts(parameter: str, converters: Sequence[WeightConverter]) -> list[str]:
    """The weights that a parameter of experts is made of, with ``*`` for the expert; nothing of any other."""
    for converter in converters:
        if len(converter.target_patterns) != 1 or (target := converter.target_patterns[0]) not in parameter:
            continue
        operations = [
            (type(op), op.dim) for op in converter.operations if isinstance(op, MergeModulelist | Concatenate)
        ]
        stacked = operations in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
        if stacked and len(operations) == len(converter.operations):
            sources = [pattern.replace("\\", "") for pattern in converter._original_source_patterns]
            return [parameter.replace(target, source) for source in sources]
    return []
