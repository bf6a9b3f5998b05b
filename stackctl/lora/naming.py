"""The names in a checkpoint and those of the modules of a base: one model goes by several, by class and by age.

The decoder of a model that sees is ``model`` in its text class, ``model.language_model`` in its whole class, and was
``language_model.model`` before transformers 4.52. Names inside changed, too, and experts of a mixture were modules of
their own, each with a LoRA, where they are one parameter now; what a module was called is in the entry of its base
(``former_names``), out of transformers' own conversion mapping. Pure: names and shapes alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from stackctl.core.schema import Base, ModuleShape
from stackctl.lora.checkpoint import Checkpoint, parse_tensor_name
from stackctl.lora.safetensors_header import TensorInfo
from stackctl.lora.target_modules import expand_modules
from stackctl.lora.target_parameters import EXPERTS, without_wrappers

_DECODERS = frozenset(
    ("model", "language_model", "text_model", "decoder", "transformer", "backbone", "llm", "gpt_neox", "thinker", "")
)
"""What the way to a decoder is made of; a tower for images or sound is reached by other names."""
INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")
"""A number between dots in a module's name: of a layer, of an expert."""


def is_unread(module: str, base: Base) -> bool:
    """Whether PEFT renames the LoRA on a module of a base when it loads it, so that it does not find it."""
    return INDEX.sub("*", module) in base.unread_names


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module of a checkpoint stands in the base; of an expert on its own, in which part of which matrix."""

    module: str
    part: int = 0
    expert: int | None = None


@dataclass(frozen=True)
class Naming:
    """A base by the names of one checkpoint: ``known`` modules with their shapes, and the ``place`` of each."""

    known: dict[str, ModuleShape]
    places: Mapping[str, Place]

    def place(self, module: str) -> Place:
        return self.places.get(module) or Place(module)

    def keeps(self, module: str) -> bool:
        """Whether a checkpoint calls a module what the base does."""
        return self.place(module) == Place(module)

    def parameter(self, name: str) -> str:
        """A parameter's name in the base, by the checkpoint's."""
        module, _, last = name.rpartition(".")
        return f"{self.place(module).module}.{last}" if module else name


@dataclass(frozen=True, slots=True)
class ExpertFactors:
    """One factor of a parameter of experts, out of a tensor for each expert and each part of its matrix.

    ``parts[p][e]`` is that of part ``p`` (of ``gate_up_proj``: gate, up) of expert ``e``. An expert's ranks are those
    of all its parts, of which each has its own rows of A and block of B. The layout is that of
    :mod:`stackctl.lora.target_parameters`.
    """

    role: Literal["A", "B"]
    parts: tuple[tuple[TensorInfo, ...], ...]

    @property
    def name(self) -> str:
        return self.parts[0][0].name

    @property
    def dtype(self) -> str:
        return self.parts[0][0].dtype

    @property
    def shape(self) -> tuple[int, int]:
        experts, (rows, columns) = len(self.parts[0]), self.parts[0][0].shape
        if self.role == "A":
            return (experts * len(self.parts) * rows, columns)
        return (len(self.parts) * rows, len(self.parts) * columns * experts)

    def join(self, zeros: Callable[[tuple[int, ...]], Any], read: Callable[[TensorInfo], Any]) -> Any:
        """The factor as one array of numpy's or torch's, whichever ``zeros`` and ``read`` make."""
        parts, experts, (rows, columns) = len(self.parts), len(self.parts[0]), self.parts[0][0].shape
        if self.role == "A":
            made = zeros((experts, parts, rows, columns))
        else:
            made = zeros((parts * rows, parts * columns, experts))
        for p, own in enumerate(self.parts):
            for e, info in enumerate(own):
                if self.role == "A":
                    made[e, p] = read(info)
                else:
                    made[p * rows : (p + 1) * rows, p * columns : (p + 1) * columns, e] = read(info)
        return made.reshape(self.shape)


def on_base(checkpoint: Checkpoint, base: Base | None, naming: Naming | None = None) -> Checkpoint:
    """A checkpoint that knows which of its modules are the base's embedding and head."""
    if base is None:
        return checkpoint
    naming = naming or naming_of(checkpoint, base, expand_modules(base.modules))
    ends = [end for end in (base.input_embedding, base.output_embedding) if end]
    inside = tuple(f"{end}." for end in ends) if checkpoint.is_lora else ()  # where other kinds have their factors
    modules = {parse_tensor_name(name).module for name in checkpoint.tensors}
    places = {name: naming.place(name).module for name in modules}
    found = frozenset(name for name, own in places.items() if own in ends or own.startswith(inside))
    return replace(checkpoint, embeddings=found)


def naming_of(checkpoint: Checkpoint, base: Base, known: dict[str, ModuleShape]) -> Naming:
    """A base by the names that a checkpoint has for its modules; its own where none fits all of them better."""
    plain = Naming(known, {})
    wanted = {without_wrappers(module) for module in checkpoint.pairs}
    missing = _missing(wanted, known)
    if not missing:
        return plain
    best = plain
    for naming in _others(wanted, base, known):
        left = _missing(wanted, naming.known)
        if len(left) < len(missing):
            best, missing = naming, left
    return best if not missing else plain


def _missing(wanted: set[str], known: Mapping[str, ModuleShape]) -> set[str]:
    left = wanted - set(known)
    return left - {name.rpartition(".")[0] for name, shape in known.items() if shape.type in EXPERTS} if left else left


def _others(wanted: set[str], base: Base, known: dict[str, ModuleShape]) -> Iterator[Naming]:
    """A base by other names: its former ones, and with each way to the decoder that the checkpoint could mean."""
    former = _former(base, known)
    for names in (Naming(known, {name: Place(name) for name in known}), former):
        if names is None:
            continue
        yield names
        inside = base.input_embedding.rpartition(".")[0] if base.input_embedding else ""
        inside = _way(inside, names)
        for theirs in sorted(_ways(wanted, inside, names.known), key=len):
            yield _moved(names, inside, theirs, base, wanted)


def _way(inside: str, names: Naming) -> str:
    """The way to the decoder by other names than the base's."""
    ours = {place.module: name for name, place in names.places.items() if place.expert is None}
    for module, theirs in ours.items():
        rest = module.removeprefix(f"{inside}.")
        if rest != module and theirs.endswith(f".{rest}"):
            return theirs.removesuffix(f".{rest}")
    return inside


def _ways(wanted: set[str], inside: str, known: Mapping[str, ModuleShape]) -> set[str]:
    """What stands in the checkpoint's names where ``inside`` stands in those that are known."""
    suffixes = {name.removeprefix(f"{inside}.") if inside else name for name in known}
    suffixes |= {suffix.rpartition(".")[0] for suffix in suffixes}
    ways = set()
    for name in wanted:
        parts = name.split(".")
        for cut in range(len(parts)):
            if not all(part in _DECODERS for part in parts[:cut]):
                break
            if ".".join(parts[cut:]) in suffixes:
                ways.add(".".join(parts[:cut]))
    return ways


def _moved(names: Naming, inside: str, theirs: str, base: Base, wanted: set[str]) -> Naming:
    head = base.output_embedding
    own_head = next((name for name in wanted if head and _is_head(name, head)), head)
    known, places = dict[str, ModuleShape](), dict[str, Place]()
    for name, shape in names.known.items():
        other = name
        if name == head and own_head:
            other = own_head
        elif inside and name.startswith(f"{inside}."):
            rest = name.removeprefix(f"{inside}.")
            other = f"{theirs}.{rest}" if theirs else rest
        elif not inside:
            other = f"{theirs}.{name}" if theirs else name
        known[other], places[other] = shape, names.place(name)
    return Naming(known, places)


def _is_head(name: str, head: str) -> bool:
    way, _, last = name.rpartition(".")
    return last == head.rpartition(".")[2] and all(part in _DECODERS for part in way.split("."))


def _former(base: Base, known: dict[str, ModuleShape]) -> Naming | None:
    """A base by the names that its modules had in files of transformers 4."""
    if not base.former_names:
        return None
    names: dict[str, ModuleShape] = {}
    places: dict[str, Place] = {}
    for name, shape in known.items():
        indices = INDEX.findall(name)
        former = base.former_names.get(INDEX.sub("*", name))
        if former is None:
            names[name], places[name] = shape, Place(name)
        elif shape.type in EXPERTS:
            experts, rows, columns = shape.shape
            for part, pattern in enumerate(former):
                own = ModuleShape(type="Linear", shape=[rows // len(former), columns])
                for expert in range(experts):
                    theirs = _filled(pattern, [*indices, str(expert)])
                    names[theirs], places[theirs] = own, Place(name, part, expert)
        else:
            theirs = _filled(former[0], indices)
            names[theirs] = ModuleShape(type="Linear", shape=shape.shape) if shape.type == "Matrix" else shape
            places[theirs] = Place(name)
    return Naming(names, places)


def _filled(pattern: str, indices: list[str]) -> str:
    parts, left = pattern.split("*"), iter(indices)
    return parts[0] + "".join(next(left, "*") + part for part in parts[1:])
