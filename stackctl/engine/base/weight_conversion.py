"""Between files and a loaded model: tensors in another dtype, and what modules were called in older files.

Each tensor is read and converted a piece at a time.

transformers maps files into memory. Where nothing is converted the mapped pages are the weights; here they would be in
memory beside them, all at once. Tensors that are read whole before they are converted cost less, but the largest of
them, an embedding, is there twice, and the allocator keeps much of what was freed between the ones that stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from stackctl.core.schema import ModuleShape
from stackctl.engine.base.configuration import read_generation_config
from stackctl.engine.base.model_class import empty_model, loading_into
from stackctl.engine.open_files import OpenFiles
from stackctl.engine.tensors import TORCH_DTYPES
from stackctl.lora.lora_config import PEFT_PREFIX
from stackctl.lora.naming import INDEX
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.lora.target_parameters import EXPERTS, parameter_of
from stackctl.registry.base_models import read_base_tensors

_PIECE = 1 << 20
"""Bytes that are read at once."""
_ADAPTER = "default"


class Unread:
    """A tensor of a file, as transformers' loader takes one: ``tensor[...].to(device, dtype)`` makes it.

    Nothing is read before its dtype is known, and then straight into memory of that dtype.
    """

    def __init__(self, path: Path, info: TensorInfo) -> None:
        self._path, self._info = path, info

    def __getitem__(self, _: object) -> Unread:
        return self

    def to(self, device: torch.device | str | None, dtype: torch.dtype) -> Tensor:
        """The whole tensor, converted.

        Raises:
            VerificationFailed: the file ends within it.
        """
        info = self._info
        made = torch.empty(info.shape, device=device, dtype=dtype)
        size = info.end - info.start
        if not size:
            return made
        buffer = bytearray(min(size, _PIECE))
        piece = torch.frombuffer(buffer, dtype=TORCH_DTYPES[info.dtype])
        places = made.view(-1).split(len(piece))
        with OpenFiles() as files:  # of its own: the loader makes several at a time
            for offset, place in zip(range(0, size, len(buffer)), places, strict=True):
                files.read_into(self._path, info, memoryview(buffer)[: len(place) * piece.element_size()], offset)
                place.copy_(piece[: len(place)])
        return made


def load_converting(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model of a folder on the CPU in ``dtype``; what it must keep in float32 stays so, as transformers has it.

    Beside it what transformers reports of loading it (``output_loading_info``).
    """
    generation = read_generation_config(folder)
    empty = empty_model(folder)
    tensors = {name: Unread(*place) for name, place in read_base_tensors(folder).items()}
    loader: Any = type(empty)  # with output_loading_info it returns a pair, which its annotation leaves out
    with loading_into(loader):
        model, found = loader.from_pretrained(
            None, config=empty.config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    model.name_or_path = model.config.name_or_path = str(folder)
    if generation is not None:
        model.generation_config = generation
    return model, found


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
            found[INDEX.sub("*", name)] = [INDEX.sub("*", part.removesuffix(".weight")) for part in former]
    return found


def unread_names(model: PreTrainedModel, modules: Mapping[str, ModuleShape]) -> list[str]:
    """Modules, with ``*`` for each number, on which PEFT does not find a LoRA again that it saved itself.

    It renames what it loads as transformers renames the files of old bases (src/peft/utils/
    transformers_weight_conversion.py), and some of those patterns match the names of a loaded model as well.
    """
    if get_checkpoint_conversion_mapping(getattr(model.config, "model_type", "")) is None:
        return []
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import build_peft_weight_mapping

    own: list[Any] = get_model_conversion_mapping(model)
    conversions = build_peft_weight_mapping(own, _ADAPTER, LoraConfig())
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    saved: dict[str, list[str]] = {}
    for name, shape in modules.items():
        holder = name.rpartition(".")[0] if shape.type in EXPERTS else name
        saved.setdefault(f"{PEFT_PREFIX}{holder}.lora_A.weight", []).append(INDEX.sub("*", name))
    lost = dict[str, None]()
    for tensor in sorted(saved, key=dot_natural_key):  # PEFT's order, which some renamings go by
        renamed, _ = rename_source_key(tensor, renamings, converters)
        if not tensor.endswith(renamed.replace(f".{_ADAPTER}", "")):  # else PEFT takes the renaming back
            lost |= dict.fromkeys(saved[tensor])
    return list(lost)


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
