"""How the tensors of a base's files become the parameters of its loaded model, and how they are written again.

Names in files, and often layouts, are other ones than in memory: experts lie apart and are loaded stacked, what was
quantised has scales beside it. transformers holds all that as data (transformers/conversion_mapping.py) and applies it
in ``from_pretrained`` (transformers/core_model_loading.py); here the same is done for a few parameters at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.quantizers.base import HfQuantizer

from stackctl.core.errors import Incompatible
from stackctl.engine.libraries import replaced
from stackctl.engine.tensors import TensorFiles
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.registry.base_models import read_base_tensors


@dataclass
class TensorGroup:
    """Tensors of files, and the parameters that are made from them together.

    ``sources`` are names in the files, each with the pattern of ``converter`` that took it; without a converter there
    is one source, which is the one target under another name or under its own.
    """

    first: str
    converter: WeightConverter | None = None
    sources: dict[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the parameter's values are those of the file, in the same order."""
        return self.converter is None


class BaseLayout:
    """The tensors of a model folder as transformers puts them into ``model``.

    ``model`` may be a loaded one or one on the meta device; of it only names, shapes and the configuration are used.
    """

    def __init__(self, folder: Path, model: PreTrainedModel, quantizer: HfQuantizer | None = None) -> None:
        self._model, self._quantizer = model, quantizer
        self.tensors: dict[str, tuple[Path, TensorInfo]] = read_base_tensors(folder)
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._mapping = get_model_conversion_mapping(model, None, quantizer)
        self.unexpected: list[str] = []
        self.groups = self._grouped()
        self._by_source = {source: group for group in self.groups for source in group.sources}
        self._by_target = {target: group for group in self.groups for target in group.targets}

    def _grouped(self) -> list[TensorGroup]:
        """The loop over names of ``convert_and_load_state_dict_in_model``."""
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        prefix, known = self._model.base_model_prefix, self._shapes
        groups: dict[str, TensorGroup] = {}
        for name in sorted(self.tensors, key=dot_natural_key):
            renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if renamed not in known and name in known:
                renamed, pattern = rename_source_key(name, [], [], prefix, known)
            if renamed not in known:
                self.unexpected.append(name)
                continue
            group = groups.setdefault(renamed, TensorGroup(renamed, by_pattern.get(pattern) if pattern else None))
            group.sources[name] = pattern or name
        for group in groups.values():
            group.targets = self._targets(group)
        return list(groups.values())

    def _targets(self, group: TensorGroup) -> tuple[str, ...]:
        if group.converter is None:
            return (group.first,)
        if len(group.converter.target_patterns) == 1 and "*" not in group.converter.target_patterns[0]:
            return (group.first,)
        made = self._convert(group, lambda _, info: torch.empty(info.shape, device="meta"))
        return tuple(made)

    def _convert(self, group: TensorGroup, read: Callable[[Path, TensorInfo], Tensor]) -> dict[str, Tensor]:
        if group.converter is None:
            (name,) = group.sources
            return {group.first: read(*self.tensors[name])}
        converter = copy.deepcopy(group.converter)
        for name, pattern in group.sources.items():
            converter.add_tensor(group.first, name, pattern, read(*self.tensors[name]))  # type: ignore[arg-type]  # or a tensor
        made = converter.convert(
            group.first, model=self._model, config=self._model.config, hf_quantizer=self._quantizer
        )
        return {name: _plain(value[0] if isinstance(value, list) else value) for name, value in made.items()}

    def group(self, parameter: str) -> TensorGroup | None:
        """What a parameter is made from; None where the files have nothing of its own, as of a tied head."""
        return self._by_target.get(parameter)

    def group_of(self, name: str) -> TensorGroup | None:
        """What a tensor of the files becomes; None where the model takes nothing of that name."""
        return self._by_source.get(name)

    def read(self, parameters: Collection[str]) -> Iterable[tuple[str, Tensor]]:
        """Some parameters as they are loaded, one group in memory at a time.

        Raises:
            KeyError: the files have nothing of that name.
            VerificationFailed: a file ends within a tensor.
        """
        wanted = set(parameters)
        groups = {id(group): group for group in (self._by_target[name] for name in sorted(wanted))}
        with torch.no_grad(), TensorFiles() as files:
            for group in groups.values():
                for name, value in self._convert(group, files.read).items():
                    if name in wanted:
                        yield name, value

    def read_group(self, group: TensorGroup, files: TensorFiles) -> dict[str, Tensor]:
        """Every parameter of a group."""
        return self._convert(group, files.read)

    def read_rows(self, name: str, rows: Collection[int]) -> Tensor:
        """Some rows of a matrix as it is stored, by its name in the files."""
        path, info = self.tensors[name]
        assert all(0 <= row < info.shape[0] for row in rows), "what lies behind a matrix is another tensor's"
        size = (info.end - info.start) // info.shape[0]
        with TensorFiles() as files:
            places = [(info.start + row * size, info.start + (row + 1) * size) for row in rows]
            return torch.cat(
                [files.read(path, TensorInfo(name, info.dtype, (1, *info.shape[1:]), *place)) for place in places]
            )

    def written(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a group by the names and in the layout of plain files of this base."""
        if self._quantizer is not None:
            names, plain = self.tensors, get_model_conversion_mapping(self._model)
            plain = [c for c in plain if any(c.rename_source_key(name)[1] is not None for name in names)]
        else:
            plain = [conversion for conversion in self._mapping if conversion.was_used()]
        with replaced(self._model, "_weight_conversions", plain):
            return dict(revert_weight_conversion(self._model, dict(values)))

    def written_as_stored(self, group: TensorGroup, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parameters of a group as the very tensors of the files that they were made from.

        Raises:
            Incompatible: transformers cannot undo what it does when it loads them.
        """
        if group.is_plain:
            return dict(zip(group.sources, values.values(), strict=True))
        made = self.written(values)
        prefix = f"{self._model.base_model_prefix}."
        for change in (lambda n: n, lambda n: n.removeprefix(prefix), lambda n: prefix + n):
            renamed = {change(name): value for name, value in made.items()}
            if set(renamed) == set(group.sources) and all(
                tuple(value.shape) == self.tensors[name][1].shape for name, value in renamed.items()
            ):
                return renamed
        raise Incompatible(
            f"{', '.join(group.targets[:2])} is made from {len(group.sources)} tensors of the base's files, in a way "
            "that cannot be undone",
            hint="export with --format peft",
        )

    def missing(self) -> set[str]:
        """Parameters that the files have nothing of, those left out that are another one's twin."""
        return set(self._shapes) - set(self._by_target) - set(self._tied())

    def twins(self) -> dict[str, str]:
        """Parameters that the files have nothing of because they are another one's twin, and that."""
        return {name: twin for name, twin in self._tied().items() if name not in self._by_target}

    def _tied(self) -> dict[str, str]:
        return getattr(self._model, "all_tied_weights_keys", None) or {}

    def shape(self, parameter: str) -> tuple[int, ...]:
        return tuple(self._shapes[parameter])


def _plain(value: Tensor) -> Tensor:
    """A weight that bitsandbytes holds in four bits as an ordinary one; any other as it is."""
    state = getattr(value, "quant_state", None)
    if state is None:
        return value
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(value.data, state)
