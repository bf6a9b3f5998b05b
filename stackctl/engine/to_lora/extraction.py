"""A LoRA out of a full fine-tune: for every linear layer the best pair of a rank for what training changed.

A layer of each model is in memory at a time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackctl.core import Say
from stackctl.core.errors import Incompatible, VerificationFailed, listed
from stackctl.core.schema import Base
from stackctl.engine.base.entry import make_base
from stackctl.engine.base.folder import base_folder
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.base.model_class import empty_model
from stackctl.engine.base.module_shapes import computes, is_called
from stackctl.engine.peft_limits import is_forbidden, not_read_back
from stackctl.engine.tensors import TensorFiles, all_finite
from stackctl.engine.to_lora.low_rank import MOST_DIRECTIONS, LowRankPairs, Truncation, whole_pair
from stackctl.lora.target_modules import expand_modules
from stackctl.registry.store import Registry


@dataclass
class Extraction(LowRankPairs):
    """What came out of two models. ``left_out`` are parameters that changed and are not kept, ``broken`` those that
    hold NaN or infinity in one of the two.
    """

    left_out: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def whole(self) -> set[str]:
        """The modules of which something is kept as it is, without those that stand in another one."""
        modules = {name.rpartition(".")[0] for name in self.saved}
        return {module for module in modules if not any(module.startswith(f"{other}.") for other in modules)}


def find_tuned(base: Base, source: str, registry: Registry, say: Say) -> tuple[Base, Path]:
    """A fine-tuned model and its folder, held against the base by what both say of their layers.

    Raises:
        NotFound, Usage, Incompatible, HubFailure: it is not there, or is no model of the same layers; with all of it.
    """
    tuned = make_base("tuned", source, None, registry, say, weights_only=True)
    problems = [
        f"the weights of {which} are stored quantised, and a change cannot be read off them"
        for which, model in ((f"'{base.name}'", base), (source, tuned))
        if model.quantization
    ]
    if other := _unlike(base, tuned):
        problems.append(f"{source} is not a fine-tune of '{base.name}': {'; '.join(other)}")
    elif tuned.fingerprint == base.fingerprint:
        problems.append(f"{source} is the base '{base.name}' itself: nothing was changed")
    if problems:
        raise Incompatible(
            "; ".join(problems), hint="give the model that was trained from that base, or another --base"
        )
    return tuned, base_folder(tuned, registry, say)


_ADAPTER = "tried"
_SHOWN = 6
"""Kinds of layers that differ of which a message tells the shapes; of others it tells how many there are."""


def _unlike(base: Base, tuned: Base) -> list[str]:
    """In what the layers of two models differ, by what both entries say."""
    found = []
    if tuned.architecture != base.architecture:
        found.append(f"it is a {tuned.architecture}, not a {base.architecture}")
    if tuned.vocabulary_size != base.vocabulary_size:
        found.append(f"its vocabulary has {tuned.vocabulary_size:,} tokens, not {base.vocabulary_size:,}")
    ours, theirs = expand_modules(base.modules), expand_modules(tuned.modules)
    kinds: dict[tuple[str, str], list[str]] = {}
    for name in {**ours, **theirs}:
        own, there = ours.get(name), theirs.get(name)
        if own == there:
            continue
        if own is None or there is None:
            what = "not in the base" if own is None else "missing"
        else:
            what = f"{there.type} {there.shape}, not {own.type} {own.shape}"
        kinds.setdefault((name.rpartition(".")[2], what), []).append(name)
    for (_, what), names in list(kinds.items())[:_SHOWN]:
        found.append(f"{names[0]} is {what}" + (f", and {len(names) - 1} more like it" if names[1:] else ""))
    return found + ([f"{len(kinds) - _SHOWN} more kinds of layers differ"] if len(kinds) > _SHOWN else [])


def extract(base: Base, folder: Path, tuned: Base, place: Path, wanted: Truncation) -> Extraction:
    """Compare two models of the same layers, parameter by parameter; ``place`` is the folder of the tuned one.

    Raises:
        Incompatible: no layer that a LoRA can stand on was changed.
        VerificationFailed: one of the models holds values that are no finite numbers.
    """
    found = Extraction(wanted)
    model = empty_model(folder)
    kinds, twins = _Kinds(base, model, folder), _twins(tuned)
    after = BaseLayout(place, empty_model(place))
    with torch.no_grad():
        for name, values in _parameters(base, BaseLayout(folder, model), after, twins):
            if values is None:
                found.left_out.append(name)
            else:
                _keep(found, kinds, name, values)
    if found.broken:
        raise VerificationFailed(
            f"values that are not finite numbers in {listed(found.broken, _SHOWN)}",
            hint="get that model again from where it was made",
        )
    _place_biases(found)
    if not found.pairs:
        others = [*found.saved, *found.left_out]
        raise Incompatible(
            "no linear layer differs between the two models" + (f" (but {', '.join(others[:3])})" if others else ""),
            hint="give a model whose linear layers were trained",
        )
    _complete(found, model, after, twins)
    found.saved_modules = sorted(found.whole)
    return found


def _parameters(
    base: Base, before: BaseLayout, after: BaseLayout, twins: Mapping[str, str]
) -> Iterator[tuple[str, tuple[Tensor, Tensor] | None]]:
    """Every parameter of a base with its values there and in the tuned model; None where that has nothing like it.

    ``twins`` are those of the tuned model.

    Raises:
        Incompatible: an embedding that is the head as well is not found.
    """
    own = _twins(base)
    with TensorFiles() as ours, TensorFiles() as theirs:
        for group in before.groups:
            if group.targets[0] in own:
                continue
            other = after.group(twins.get(group.targets[0], group.targets[0]))
            if other is None:
                yield from ((name, None) for name in group.targets)
                continue
            new = after.read_group(other, theirs)
            for name, old in before.read_group(group, ours).items():
                yield name, (old, new.pop(twins.get(name, name)))
        for head, embedding in own.items():  # a head that is the embedding in the base, and changes with it or alone
            there = twins.get(head, head)
            own_group, new_group = before.group(embedding), after.group(there)
            if own_group is None or new_group is None:  # as in ProphetNet, which has it outside of the decoder
                raise Incompatible(
                    f"'{base.name}' has {embedding} under another name in its files, where no change is looked for",
                    hint="train the adapter instead: stackctl train",
                )
            yield head, (before.read_group(own_group, ours)[embedding], after.read_group(new_group, theirs)[there])


def _twins(model: Base) -> dict[str, str]:
    """The weight of a head that is the embedding's, to that."""
    if not (model.tied_embeddings and model.output_embedding and model.input_embedding):
        return {}
    return {f"{model.output_embedding}.weight": f"{model.input_embedding}.weight"}


class _Kinds:
    """What each module of a base is, and how its change can be kept."""

    def __init__(self, base: Base, model: PreTrainedModel, folder: Path) -> None:
        self._base, self._model, self._folder = base, model, folder
        self.shapes = expand_modules(base.modules)

    @cached_property
    def _unread(self) -> set[str]:
        """The layers whose LoRA PEFT would save and not find again."""
        kinds = ("Linear", "Conv1D", "Embedding")
        layers = [n for n, shape in self.shapes.items() if shape.type in kinds and not is_forbidden(self._model, n)]
        config = LoraConfig(target_modules="|".join(map(re.escape, layers)))  # of a list PEFT takes the ends of names
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft = get_peft_model(empty_model(self._folder), config, _ADAPTER, low_cpu_mem_usage=True)
            return not_read_back(peft, _ADAPTER, layers)

    def type(self, module: str) -> str | None:
        """The type of ``ModuleShape``; None of what no LoRA can stand on."""
        shape = self.shapes.get(module)
        return shape.type if shape else None

    def is_table(self, module: str) -> bool:
        return self.type(module) == "Embedding" or module == self._base.output_embedding

    def has_parts(self, module: str) -> bool:
        """Whether other modules stand in it: PEFT would keep those whole as well."""
        return any(True for _ in self._model.get_submodule(module).children())

    def takes_lora(self, module: str) -> bool:
        """Whether PEFT's LoRA computes on it what folding does, or can stand on it at all.

        On an embedding it looks up whatever that is given first, which for positions (OPT, BART) is no token.
        """
        own = self._model.get_submodule(module)
        if not is_called(self._model, module) or module in self._unread:
            return False
        if isinstance(own, nn.Embedding):
            return not computes(own)
        return not is_forbidden(self._model, module)


def _keep(found: Extraction, kinds: _Kinds, name: str, values: tuple[Tensor, Tensor]) -> None:
    """What is kept of one parameter, if it changed: by more than the rounding of the dtype that it was saved in."""
    old, new = values
    if torch.equal(old.to(new.dtype), new):
        return
    broken = [which for which, one in (("the base", old), ("the fine-tune", new)) if not all_finite(one)]
    if broken:
        found.broken += [f"{name} of {which}" for which in broken]
        return
    module, _, kind = name.rpartition(".")
    if own := kinds.type(name):  # a parameter of experts
        delta = new.float() - old.float()
        found.keep(name, delta.mT if own == "TransposedExperts" else delta)
        return
    type_ = kinds.type(module)
    if kind == "weight" and type_ and not kinds.takes_lora(module):
        found.saved[name] = new.contiguous()
    elif kind == "weight" and kinds.is_table(module):
        _keep_table(found, module, new, new.float() - old.float(), transposed=type_ == "Embedding")
    elif kind == "weight" and type_ in ("Linear", "Conv1D", "Matrix"):
        delta = new.float() - old.float()
        found.keep(module, delta.T if type_ == "Conv1D" else delta)
    elif kind == "bias" and type_ in ("Linear", "Conv1D"):
        found.biases[module] = new.contiguous()
    elif type_ is None and kind in ("weight", "bias") and not kinds.has_parts(module):  # a norm
        found.saved[name] = new.contiguous()
    else:
        found.left_out.append(name)


def _keep_table(found: Extraction, module: str, new: Tensor, delta: Tensor, *, transposed: bool) -> None:
    """Keep an embedding or a head: as a pair where one of the rank that was asked for holds its change, else whole.

    ``new`` and ``delta`` are (vocabulary, dimension). A training moves the rows of many tokens apart from each other,
    of which a pair of a low rank would lose most.
    """
    pair = whole_pair(delta, found.wanted.rank or MOST_DIRECTIONS)
    if pair is None:
        found.saved[f"{module}.weight"] = new.contiguous()
    elif transposed:
        a, b = pair
        found.put(module, (b.T.contiguous(), a.T.contiguous()), delta.T)
    else:
        found.put(module, pair, delta)


def _place_biases(found: Extraction) -> None:
    """PEFT keeps biases of layers that it adapts, and with modules that are kept whole; others are left out."""
    for module in found.biases.keys() - found.pairs.keys():
        bias = found.biases.pop(module)
        if f"{module}.weight" in found.saved:
            found.saved[f"{module}.bias"] = bias
        else:
            found.left_out.append(f"{module}.bias")


def _complete(found: Extraction, model: PreTrainedModel, tuned: BaseLayout, twins: Mapping[str, str]) -> None:
    """Add what did not change of modules that are kept whole: PEFT loads a module whole, or not at all."""
    kept = (f"{module}.{name}" for module in found.whole for name in model.get_submodule(module).state_dict())
    missing = {twins.get(name, name): name for name in kept if name not in found.saved}
    found.saved |= {missing[there]: value.contiguous() for there, value in tuned.read(missing)}
