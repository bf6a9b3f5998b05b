"""The layers that PEFT put an adapter on: each merged by itself in float64, and taken off again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.tensors import all_finite

ADAPTER = "default"
"""The name inside PEFT of the adapter that is merged."""
PEFT_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, ImportError, AttributeError, AssertionError)
"""What PEFT raises where a configuration is none for a model; NotImplementedError is a RuntimeError."""
_TOLERANCE = 1e-5
"""How far a merged layer may be from the live one: some of PEFT's kinds compute a part in float32 whatever they get."""
_HINT = "use it with PEFT itself; only a change of weights can be made a LoRA"

_NOT_FINITE = "look at its lora_alpha, which PiSSA divides by and takes roots of: it has to be positive there"


class Kept:
    """A module that an adapter may change: itself, the parameters it has, and their values."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = dict(module.named_parameters(recurse=False))
        self.values = {name: p.detach().clone() for name, p in self.parameters.items()}

    def set(self, weight: Tensor, bias: Tensor | None) -> None:
        """Give the module other values, in parameters of its own: another module may share those that it has."""
        new = {"weight": weight} | ({} if bias is None else {"bias": bias})
        for name, value in new.items():
            own = self.values[name]
            setattr(self.module, name, nn.Parameter(value.detach().to(own), requires_grad=False))

    def restore(self) -> None:
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.data = self.values[name]
            setattr(self.module, name, parameter)


def tuner_layers(model: nn.Module, kind: type[Any]) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kind)]


@torch.no_grad()
def merged_layer(name: str, layer: Any) -> Any:
    """A layer's own base layer with the adapter merged into it, in float64, held against the live layer.

    Raises:
        Incompatible: it cannot be merged, or is another thing then.
    """
    alone = copy.deepcopy(layer).double()
    base = alone.get_base_layer()
    if isinstance(base, nn.Embedding):
        inputs = torch.arange(min(base.num_embeddings, 512), device=base.weight.device)[None]
    else:
        width = base.weight.shape[0 if isinstance(base, Conv1D) else 1]
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(1, 8, width, generator=generator, dtype=torch.float64).to(base.weight.device)
    try:
        live = alone(inputs)
        if not all_finite(live):
            raise Incompatible(f"on {name} PEFT makes NaN or infinity of it", hint=_NOT_FINITE)
        alone.merge(adapter_names=[ADAPTER])
        merged = alone.get_base_layer()
        error = float((merged(inputs) - live).norm() / live.norm().clamp_min(1e-30))
    except PEFT_ERRORS as failure:
        what = f"PEFT cannot merge the adapter into {name}: {first_line(failure)[:300]}"
        raise Incompatible(what, hint=_HINT) from None
    if not error <= _TOLERANCE:
        raise Incompatible(
            f"merged into {name}, the adapter does not compute what it does live ({error:.1e} apart)", hint=_HINT
        )
    return merged
