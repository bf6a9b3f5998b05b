"""vLLM's models are expressions: what its plug-in group ``vllm.general_plugins`` finds of this package.

vLLM asks a resolver for the LoRA of a model that it does not know (vllm/lora/resolver.py). Ours parses the name as an
expression of the registry that ``STACKCTL_REGISTRY`` names, plans it, exports it into the cache as one plain LoRA, and
hands that over. What cannot be served is told in the answer. Run with vLLM 0.32; its own modules are imported in
:func:`register` alone, which is called in each of its processes.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, StackctlError
from stackctl.core.schema import Base
from stackctl.plan.lint import VLLM_DEFAULT_RANK, check_beside_base
from stackctl.plan.stack_plan import StackPlan
from stackctl.plan.whole_class import on_whole_class
from stackctl.registry.base_models import fingerprint
from stackctl.registry.export_cache import exported
from stackctl.registry.store import Registry, find_registry
from stackctl.serving.model_names import ModelNames
from stackctl.serving.response_body import api_error

REGISTRY = "STACKCTL_REGISTRY"


def register() -> None:
    """Have vLLM ask the registry for models that it does not know; without ``STACKCTL_REGISTRY`` nothing is done.

    Raises:
        NotFound: there is no registry where it says.
    """
    if not os.environ.get(REGISTRY):
        return
    from fastapi import HTTPException
    from vllm.lora.request import LoRARequest
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    expressions = Expressions(Registry(find_registry(None)), max_rank(sys.argv))

    class ExpressionResolver(LoRAResolver):  # type: ignore[misc]
        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            try:
                folder = await asyncio.to_thread(expressions.export, base_model_name, lora_name)
            except StackctlError as error:
                answer = api_error(error)
                raise HTTPException(answer.status, answer.message) from error
            return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=str(folder))  # vLLM numbers it itself

    LoRAResolverRegistry.register_resolver("stackctl", ExpressionResolver())


def max_rank(arguments: Sequence[str]) -> int:
    """The largest rank that a command line of vLLM allows an adapter."""
    found = VLLM_DEFAULT_RANK
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, _, value = word.partition("=")
        if name.replace("_", "-") == "--max-lora-rank" and (value or following).isdecimal():
            found = int(value or following)
    return found


@dataclass
class Expressions:
    """The expressions of a registry, as LoRAs of no more than ``rank`` for whatever base vLLM runs."""

    registry: Registry
    rank: int
    _models: dict[str, ModelNames] = field(default_factory=dict)

    def export(self, base_model: str, text: str) -> Path:
        """The folder with an expression as one plain LoRA. ``base_model`` is what vLLM was told to run.

        Raises:
            NotFound, Usage, Incompatible, VerificationFailed: there is no such model, or why it cannot be served.
        """
        if base_model not in self._models:
            self._models[base_model] = ModelNames(self.registry, self._base(base_model))
        stack, plan = self._models[base_model].find(text)
        if stack.base.whole is not None:
            plan = on_whole_class(plan)
        check_beside_base("vllm", plan)
        if plan.rank > self.rank:
            raise Incompatible(
                f"'{text}' has rank {plan.rank}, and this server takes at most {self.rank}",
                hint="start it with a larger --max-lora-rank, or compose the stack with --method svd --rank N",
            )
        return exported(plan, "peft", partial(_write, plan))

    def _base(self, base_model: str) -> Base:
        """The registered base that vLLM runs, by its fingerprint where it is a folder, else by its name on the Hub."""
        bases = list(self.registry.bases())
        folder = Path(base_model)
        if folder.is_dir():
            found = fingerprint(folder)
            known = [base for base in bases if base.fingerprint == found]
        else:
            known = [base for base in bases if base_model in (base.source, base.hub_id)]
        if not known:
            names = ", ".join(base.name for base in bases) or "none"
            raise Incompatible(
                f"vLLM runs {base_model}, which is not a base of the registry (it has {names})",
                hint=f"stackctl base add NAME {base_model}",
            )
        return known[0]


def _write(plan: StackPlan, out: Path) -> None:
    """Write a stack; the base alone as an adapter of zeros.

    vLLM 0.32 on a CPU gives a row without an adapter that of another row in its batch (seen: the base's text was that
    of a stack asked for at the same time). A row with zeros is right everywhere.
    """
    if plan.modules:
        from stackctl.engine.export.peft import export_peft

        export_peft(plan, out)
        return
    from stackctl.engine.to_lora.low_rank import export_zero

    export_zero(plan, out)
