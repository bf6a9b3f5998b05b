"""Models that are made without memory for their weights, and without first values in them.

transformers makes a model on the meta device for that. There each operation on a buffer, such as the angles of rotary
positions, goes through torch's decompositions in Python, which import sympy: half a second, and half of what reading
SmolLM2's weights takes on two slow cores. Here parameters alone have no memory, and buffers are computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from transformers import PreTrainedModel, initialization

from stackctl.engine.replaced import replaced

_register = nn.Module.register_parameter


def _register_without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    if parameter is not None and not parameter.is_meta and not is_lazy(parameter):
        empty = torch.empty_like(parameter, device="meta")
        parameter = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    _register(module, name, parameter)


@contextlib.contextmanager
def without_weights() -> Iterator[None]:
    """Parameters of modules that are made in the body are on the meta device; nothing is initialised, tied is tied."""
    with (
        initialization.no_init_weights(),
        replaced(PreTrainedModel, "init_weights", lambda model: model.tie_weights(recompute_mapping=False)),
        replaced(nn.Module, "register_parameter", _register_without_memory),
    ):
        yield


@contextlib.contextmanager
def loading_into(loader: type[PreTrainedModel]) -> Iterator[None]:
    """``loader.from_pretrained`` in the body makes its model so (``get_init_context``, transformers 5.23).

    It gives what was not in the files, and buffers that never are, their values afterwards.
    """
    own = loader.get_init_context

    def contexts(*given: Any) -> list[Any]:
        return [*(one for one in own(*given) if not isinstance(one, torch.device)), without_weights()]

    with replaced(loader, "get_init_context", contexts):
        yield
