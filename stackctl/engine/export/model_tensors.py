"""Which tensors a full model's files hold, and what each is made from: the plan of an export, and its values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from stackctl.core.errors import Incompatible
from stackctl.engine.base.layout import BaseLayout, TensorGroup
from stackctl.engine.merging import exact_delta, module_delta
from stackctl.engine.safetensors_writer import SAFETENSORS_NAMES
from stackctl.engine.tensors import TORCH_DTYPES, MemberTensors
from stackctl.engine.token_rows import new_rows
from stackctl.lora.safetensors_header import DTYPE_NAMES
from stackctl.plan.methods import SUM
from stackctl.plan.stack_plan import ModulePlan, Replacement, StackPlan, TokenRows
from stackctl.plan.token_rows import differ_on_tied

_SINGLE, _SECOND = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
_EXTRA = "model-untied.safetensors"


@dataclass(frozen=True)
class Written:
    """One tensor of a shard: its name, dtype (of safetensors) and shape, and the parameters that it is made from.

    Without a ``group`` it is copied from the base's files.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    group: TensorGroup | None = None
    changed: bool = False
    """Whether the stack stands on it."""
    untied: str | None = None
    """The parameter that it is, where the files have only its twin, which ``group`` makes."""


@dataclass
class ModelTensors:
    """A stack summed into its base, tensor by tensor.

    ``dtype`` is torch's name of the dtype of floating-point tensors, or ``auto``: each one's own, and of what is stored
    quantised the one that the base is computed in.
    """

    plan: StackPlan
    layout: BaseLayout
    quantised: bool
    dtype: str
    worst: float = 0.0
    """The worst module's ‖(W' - W) - ΔW‖ / ‖ΔW‖ so far."""
    _ready: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._modules = {module.parameter: module for module in self.plan.modules.values()}
        self._replaced = {replacement.parameter: replacement for replacement in self.plan.replacements}
        base = self.plan.known_base
        self._base = base
        head, embedding = (f"{base.output_embedding}.weight", f"{base.input_embedding}.weight")
        tied = base.tied_embeddings and base.output_embedding is not None
        touched = set(self._modules) | set(self._replaced)
        self._rows: dict[str, list[TokenRows]] = {}
        for rows in self.plan.token_rows:
            self._rows.setdefault(rows.parameter, []).append(rows)
        self.untied = tied and (bool({head, embedding} & touched) or differ_on_tied(self.plan.token_rows, base))
        """Whether a tied pair has to be taken apart, for a stack that touches one of them."""
        absent = {head: embedding} if tied and self.layout.group(head) is None else {}
        self._twins = {**self.layout.twins(), **absent} if self.untied else {}
        """Parameters that the files have nothing of while they are tied; a configuration unties all of them or none."""
        self._head = head
        self._changed = touched | set(self._rows)
        for parameter in sorted(self._changed - set(absent)):
            if self.layout.group(parameter) is None:
                raise Incompatible(
                    f"the files of '{base.name}' have no {parameter}, so that no full model can be written",
                    hint="export with --format peft",
                )

    def shards(self) -> dict[str, list[Written]]:
        """What every file holds, by the names of the base's files; what was tied gets a file of its own."""
        shards: dict[str, list[Written]] = {}
        for name, (path, _) in self.layout.tensors.items():
            shards.setdefault(path.name, []).extend(self._made_of(name))
        if not self._twins:
            return shards
        if len(shards) == 1:  # readers prefer model.safetensors to an index, so a second file needs the first renamed
            shards = {_SINGLE: next(iter(shards.values()))}
        shards[_SECOND if len(shards) == 1 else _EXTRA] = [self._taken_apart(name) for name in self._twins]
        return shards

    def _taken_apart(self, parameter: str) -> Written:
        """What is written of a parameter that the files have only the twin of."""
        group = self.layout.group(self._twins[parameter])
        assert group is not None, "a tied parameter's twin is stored"
        (name,) = self.layout.written({parameter: self._empty(parameter)})
        return Written(
            name, self._wanted(next(iter(group.sources))), self.layout.shape(parameter), group,
            self._standing(parameter) in self._changed, parameter,
        )  # fmt: skip

    def _standing(self, untied: str) -> str:
        """The parameter whose change a twin gets: a head its own, any other its twin's."""
        return untied if untied == self._head else self._twins[untied]

    def _made_of(self, name: str) -> Iterator[Written]:
        """What is written where the base's files have the tensor ``name``."""
        _, info = self.layout.tensors[name]
        group = self.layout.group_of(name)
        if group is None:
            if self.quantised and info.dtype not in DTYPE_NAMES:
                return  # a scale of activations, or the like: no part of a plain model
            yield Written(name, self._wanted(name), info.shape)
            return
        changed = any(target in self._changed for target in group.targets)
        if not self.quantised:
            yield Written(name, self._wanted(name), info.shape, group if changed else None, changed)
        elif name == next(iter(group.sources)):
            for made, empty in self.layout.written({t: self._empty(t) for t in group.targets}).items():
                yield Written(made, self._wanted(name), tuple(empty.shape), group, changed)

    def _empty(self, parameter: str) -> Tensor:
        return torch.empty(self.layout.shape(parameter), device="meta")

    def _wanted(self, name: str) -> str:
        own = self.layout.tensors[name][1].dtype
        if self.dtype != "auto" and (self.quantised or own in DTYPE_NAMES):
            return SAFETENSORS_NAMES[self.dtype]
        return SAFETENSORS_NAMES[self._base.dtype] if self.quantised else own

    def value(self, wanted: Written, tensors: MemberTensors) -> Tensor:
        """The tensor that is written, in its dtype.

        Raises:
            Incompatible: what the stack stands on is stored in a way that transformers cannot undo.
            VerificationFailed: a value is not finite.
        """
        dtype = TORCH_DTYPES[wanted.dtype]
        if wanted.group is None:
            return tensors.read(*self.layout.tensors[wanted.name]).to(dtype)
        if wanted.untied is not None:
            twin = self.layout.read_group(wanted.group, tensors)[self._twins[wanted.untied]]
            return self._summed(self._standing(wanted.untied), twin, tensors, dtype)
        if wanted.name not in self._ready:  # what a group makes beside it is asked for later
            made = {
                target: self._summed(target, weight, tensors, dtype)
                for target, weight in self.layout.read_group(wanted.group, tensors).items()
            }
            layout = self.layout
            self._ready |= layout.written(made) if self.quantised else layout.written_as_stored(wanted.group, made)
        return self._ready.pop(wanted.name)

    def _summed(self, parameter: str, weight: Tensor, tensors: MemberTensors, dtype: torch.dtype) -> Tensor:
        """A parameter with the stack in it, summed in float32 and rounded once; measures what that lost."""
        replacement: Replacement | None = self._replaced.get(parameter)
        module: ModulePlan | None = self._modules.get(parameter)
        if parameter in self._rows:
            return self._with_rows(weight, self._rows[parameter], tensors, dtype)
        if replacement is not None:
            weight = tensors.of(replacement.member, replacement.tensor)
        if module is None:
            return weight.to(dtype)
        factors = tensors.factors(module)
        delta = module_delta(self.plan, module, factors)
        wished = delta if self.plan.method == SUM else exact_delta(module, factors)
        if module.is_transposed:
            delta, wished = delta.mT, wished.mT
        summed = (weight.float() + delta).to(dtype)
        self.worst = max(self.worst, _lost(weight, wished, summed))
        return summed

    def _with_rows(self, weight: Tensor, found: list[TokenRows], tensors: MemberTensors, dtype: torch.dtype) -> Tensor:
        """A parameter with the rows of single tokens in it; a plan has nothing else on one."""
        written = weight.to(dtype, copy=True)
        for rows in found:
            own = weight[list(rows.tokens)].float()
            new = new_rows(rows, lambda own=own: own, tensors)  # type: ignore[misc]
            written[list(rows.tokens)] = new.to(dtype)
            self.worst = max(self.worst, _lost(own, new - own, written[list(rows.tokens)]))
        return written


def _lost(before: Tensor, delta: Tensor, after: Tensor) -> float:
    """‖(after - before) - delta‖ / ‖delta‖, in float64."""
    norm = float(delta.double().norm())
    return float((after.double() - before.double() - delta.double()).norm()) / norm if norm else 0.0
