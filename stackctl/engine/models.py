"""Load a base, fold stacks into its weights and take them out again, or attach one live.

Folding computes every sum in float32 and rounds once. What was folded is taken out by going back to the base's own
weights, mapped from its files or read again, never by subtracting: A → B → A gives bit-identical weights.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stackctl.core import Say
from stackctl.core.errors import Incompatible
from stackctl.core.schema import Base
from stackctl.engine import imports_are_done
from stackctl.engine.algebra import Factors
from stackctl.engine.base.folder import base_folder
from stackctl.engine.base.layout import BaseLayout
from stackctl.engine.base.loading import load_weights
from stackctl.engine.base.model_class import quantised_skeleton
from stackctl.engine.base.private_weights import PrivateWeights, forget_pages
from stackctl.engine.base.tokenizer import load_tokenizer
from stackctl.engine.devices import DTYPES, choose_device, choose_dtype
from stackctl.engine.folding import Adder, Delta, Rounding, deltas_of
from stackctl.engine.libraries import quiet_libraries
from stackctl.engine.merging import each_module
from stackctl.engine.quick_imports import import_peft
from stackctl.engine.tensors import MemberTensors
from stackctl.engine.token_rows import refuse_unlike_peft, set_rows
from stackctl.machine.resources import return_freed_memory
from stackctl.plan.stack_plan import ModulePlan, Replacement, StackPlan
from stackctl.plan.token_rows import differ_on_tied
from stackctl.registry.base_quantization import stored_scheme
from stackctl.registry.store import Registry

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What models call the keys and values that they are given: since transformers 5.24, and before, as code that
comes with a model may for ever."""


@dataclass
class StackedModel:
    """A base in memory, with one stack at a time folded into it."""

    base: Base
    folder: Path
    model: PreTrainedModel
    tokenizer: Any
    device: torch.device
    plan: StackPlan | None = None
    rounding_error: float = 0.0
    _touched: set[str] = field(default_factory=set)
    _tied: bool = False
    _live: bool = False

    def use(self, plan: StackPlan, *, live: bool = False) -> None:
        """Fold a stack, or with ``live`` attach it as one LoRA, after taking out the one that is used now.

        Sets ``rounding_error``: ‖what the weights gained - ΔW‖ / ‖ΔW‖ over all modules.

        Raises:
            Incompatible, VerificationFailed: the plan has problems, or a tensor is not finite.
        """
        plan.check()
        self.restore()
        self.plan = plan
        if live and plan.members:
            self.write_token_rows(plan)
            if plan.modules:
                import_peft()  # which takes seconds, and folding needs none of it
                from stackctl.engine.live_adapter import attach_live

                attach_live(self.model, plan)
                self._live = True
            return
        self.fold(plan)

    def fold(self, plan: StackPlan) -> None:
        """Fold a stack on top of what is there; :meth:`restore` takes both out.

        Raises:
            Incompatible, VerificationFailed: as :meth:`use`.
        """
        plan.check()
        refuse_unlike_peft(plan, self.model)
        self._untie_for(plan)
        adder = Adder()
        with torch.no_grad(), MemberTensors(plan) as tensors:
            self._fold_modules(plan, tensors, adder)
            self._write_rows(plan, tensors, adder.rounding)
            self.rounding_error = adder.rounding.error
            changed = {module.parameter for module in plan.modules.values()}
            for replacement in plan.replacements:
                if replacement.parameter not in changed:  # else it was summed with the change
                    parameter, value = self._replaced(replacement, tensors)
                    parameter.copy_(value)
                    self._touched.add(replacement.parameter)

    def _replaced(self, replacement: Replacement, tensors: MemberTensors) -> tuple[nn.Parameter, Tensor]:
        """A parameter that a member brings whole, and the member's value."""
        parameter = self._parameter(replacement.parameter)
        value = tensors.of(replacement.member, replacement.tensor)
        self._check_shape(replacement.parameter, parameter, value.shape)
        return parameter, value.to(parameter.device)

    def write_token_rows(self, plan: StackPlan) -> None:
        """Write the rows of single tokens into the weights and nothing else: beside a base PEFT does the same.

        Raises:
            Incompatible: PEFT would compute something else with them.
        """
        refuse_unlike_peft(plan, self.model)
        if differ_on_tied(plan.token_rows, plan.base):
            self._untie()
        with torch.no_grad(), MemberTensors(plan) as tensors:
            self._write_rows(plan, tensors, Rounding())

    def _write_rows(self, plan: StackPlan, tensors: MemberTensors, rounding: Rounding) -> None:
        written = set[tuple[int, int, str]]()
        for rows in plan.token_rows:
            weight = self._parameter(rows.parameter)
            key = (id(weight), rows.member, rows.tensor.name)
            if key not in written:  # a tied head is the embedding
                set_rows(weight, rows, tensors, rounding)
            written.add(key)
            self._touched.add(rows.parameter)

    def _fold_modules(self, plan: StackPlan, tensors: MemberTensors, adder: Adder) -> None:
        def made(module: ModulePlan, factors: Sequence[Factors]) -> tuple[nn.Parameter, list[Delta]]:
            weight = self._parameter(module.parameter)
            self._check_shape(module.parameter, weight, module.stored_shape)
            return weight, list(deltas_of(plan, module, factors, weight.device))

        replaced = {replacement.parameter: replacement for replacement in plan.replacements}
        names = [module.parameter for module in plan.modules.values() if module.parameter not in replaced]
        moved = self._own.move({name: self._parameter(name) for name in names if name not in self._touched})
        for module, (weight, deltas) in each_module(plan, tensors, made):
            base = moved.pop(module.parameter, None)
            if whole := replaced.get(module.parameter):
                base = self._replaced(whole, tensors)[1].float()
            before = [None] * len(deltas) if base is None else base if module.is_experts else [base]
            for matrix, delta, own in zip(weight if module.is_experts else [weight], deltas, before, strict=True):
                adder.add(matrix, delta, own)
            if base is not None and not whole:
                forget_pages(base)
            self._touched.add(module.parameter)

    def restore(self) -> None:
        """Take the stack out; weights that are not mapped are read from the base's files again."""
        if self._live:
            from stackctl.engine.live_adapter import detach_live

            detach_live(self.model)
            self._live = False
        self._touched -= self._own.restore()
        if self._touched:
            self._read_again()
        self._touched.clear()
        if self._tied:
            self.model.get_output_embeddings().weight = self.model.get_input_embeddings().weight
            self._tied = False
        self.plan, self.rounding_error = None, 0.0

    def _read_again(self) -> None:
        """Give every weight that was touched its value of the files; what they do not have, its twin's."""
        layout, embedding = self.layout, self.model.get_input_embeddings()
        twin = next(f"{name}.weight" for name, module in self.model.named_modules() if module is embedding)
        twins = layout.twins()
        sources = {name: name if layout.group(name) else twins.get(name, twin) for name in self._touched}
        with torch.no_grad():
            for source, value in layout.read(set(sources.values())):
                for name in [name for name, own in sources.items() if own == source]:
                    self._parameter(name).copy_(value)

    @cached_property
    def _own(self) -> PrivateWeights:
        return PrivateWeights(self.folder)

    @property
    def generation_config(self) -> Any:
        return self.model.generation_config

    @property
    def precision(self) -> str:
        return f"{str(self.model.dtype).removeprefix('torch.')} on {self.device.type}"

    @cached_property
    def layout(self) -> BaseLayout:
        """How the base's files become its parameters."""
        if stored_scheme(self.folder) is None:
            return BaseLayout(self.folder, self.model)
        return BaseLayout(self.folder, *quantised_skeleton(self.folder, self.model.dtype))

    def _untie_for(self, plan: StackPlan) -> None:
        """Give the output embedding a weight of its own when a member touches one of a tied pair.

        PEFT's LoRA on one of them leaves the other alone, which one shared weight could not.
        """
        ends = {id(self.model.get_output_embeddings()), id(self.model.get_input_embeddings())}
        pair = {name for name, module in self.model.named_modules() if id(module) in ends}
        touched = set(plan.modules) | {r.parameter.removesuffix(".weight") for r in plan.replacements}
        if pair & touched or differ_on_tied(plan.token_rows, plan.base):
            self._untie()

    def _untie(self) -> None:
        output, tied = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        if output is not None and tied is not None and output.weight is tied.weight:
            output.weight = nn.Parameter(tied.weight.detach().clone(), requires_grad=False)
            self._tied = True

    def _parameter(self, name: str) -> nn.Parameter:
        try:
            return self.model.get_parameter(name)
        except AttributeError:
            raise Incompatible(f"the base '{self.base.name}' has no parameter {name}") from None

    def _check_shape(self, name: str, weight: Tensor, shape: Sequence[int]) -> None:
        if tuple(weight.shape) != tuple(shape):
            shapes = f"{list(shape)}, not {list(weight.shape)}"
            raise Incompatible(f"a member's tensor for {name} of '{self.base.name}' has shape {shapes}")


def load_base(
    base: Base, registry: Registry, *, dtype: str = "auto", device: str = "auto", say: Say = lambda _: None
) -> StackedModel:
    """Load a base with its tokenizer, ready to have stacks folded into it.

    Raises:
        NotFound, VerificationFailed, Incompatible: its files are gone, changed, or cannot be loaded.
    """
    quiet_libraries()
    imports_are_done()
    folder = base_folder(base, registry, say)
    where = choose_device(device)
    plain = choose_dtype(dtype, where, base)
    tokenizer = load_tokenizer(folder)
    return_freed_memory()  # reading a large vocabulary takes three times what stays of it; the weights come after it
    model = load_weights(
        folder,
        plain,
        where,
        four_bits=dtype == "nf4",
        converts=where.type == "cpu" and dtype != "nf4" and DTYPES.get(base.dtype) not in (None, plain),
    )
    model.requires_grad_(False)
    model.eval()
    return StackedModel(base, folder, model, tokenizer, where)


def cache_argument(function: Callable[..., Any]) -> str:
    """What a function of a model calls the keys and values that it goes on from."""
    return next(name for name in CACHE_ARGUMENTS if name in inspect.signature(function).parameters)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and back to what it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
