"""The head of a causal LM: what makes logits of hidden states, if that is all that is done to them.

Whether logits really are what a head makes of hidden states is looked at and not believed: see :func:`find_head`.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stackctl.engine.models import evaluating

_PROOF_TOKENS = 4
Projection = Callable[[Tensor], Tensor]
"""Hidden states (c, d) to logits (c, vocabulary)."""


@dataclass(frozen=True)
class OutputHead:
    """Hidden states (K, d) to logits (K, vocabulary): a module, a factor, and a cap: cap · tanh(logits / cap)."""

    module: nn.Module
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What of it is trained: a LoRA on the head, or a saved copy."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def alone(self) -> LinearHead | None:
        """Where it is nothing but a linear layer that learns nothing: that, with room for a chunk's logits."""
        if not self._is_frozen_linear() or self.soft_cap is not None:
            return None
        return LinearHead(self.module, self.scale)

    def _is_frozen_linear(self) -> bool:
        return type(self.module) is nn.Linear and not self.parameters

    def prepare(self) -> Projection:
        """A function that makes logits of a chunk; what autocast would cast for each chunk is cast once."""
        project: Projection = self.module
        rows = getattr(self.module, "token_adapter", None)
        if self._is_frozen_linear():
            project = LinearHead(self.module, 1.0).project
        elif rows is not None:
            project = _with_rows(rows)

        def logits(hidden: Tensor) -> Tensor:
            found = project(hidden)
            found = found if self.scale == 1.0 else found * self.scale
            return found if self.soft_cap is None else self.soft_cap * torch.tanh(found / self.soft_cap)

        return logits


class LinearHead:
    """A linear head that learns nothing: weight (vocabulary, d), bias (vocabulary,), in the precision of autocast if
    there is one, to which they are cast once."""

    def __init__(self, layer: Any, scale: float) -> None:
        weight: Tensor = layer.weight.detach()
        dtype = autocast_dtype(weight) or weight.dtype
        self._weight, self._scale = weight.to(dtype), scale
        self._bias: Tensor | None = None if layer.bias is None else layer.bias.detach().to(dtype)
        self._own, self._values = weight.new_empty(0, dtype=dtype), weight.new_empty(0, dtype=torch.float32)

    def project(self, hidden: Tensor) -> Tensor:
        """Hidden states (c, d) to logits (c, vocabulary) in memory of their own, differentiable in the former."""
        found = functional.linear(hidden.to(self._weight.dtype), self._weight, self._bias)
        return found if self._scale == 1.0 else found * self._scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (c, d) to float32 logits (c, vocabulary), which are overwritten by the next call: memory that
        is new is slow to write."""
        shape = (len(hidden), len(self._weight))
        self._own.resize_(shape)
        hidden = hidden.to(self._own.dtype)
        if self._bias is None:
            torch.mm(hidden, self._weight.T, out=self._own)
        else:
            torch.addmm(self._bias, hidden, self._weight.T, out=self._own)
        if self._scale != 1.0:
            self._own *= self._scale
        if self._own.dtype == torch.float32:
            return self._own
        return self._values.resize_(shape).copy_(self._own)

    def gradient(self, of_logits: Tensor) -> Tensor:
        """The gradient of hidden states (c, d) from that of their logits, which are overwritten."""
        if of_logits is not self._own:
            self._own.copy_(of_logits)
        found = torch.mm(self._own, self._weight)
        return found if self._scale == 1.0 else found.mul_(self._scale)


def _with_rows(rows: Any) -> Projection:
    """The head under PEFT's rows of single tokens: put into the weight once, not for each chunk.

    The same logits, bit for bit; gradients of the rows come from their own logits alone, not by way of a gradient of
    the whole weight.
    """
    layer = rows.get_base_layer()
    active = [] if rows.disable_adapters else list(rows.active_adapters)
    dtype = autocast_dtype(layer.weight) or layer.weight.dtype
    weight, bias = layer.weight.detach().to(dtype, copy=bool(active)), layer.bias if not active else None
    learned = []
    for name in active:
        index = torch.tensor(rows.token_indices[name], device=weight.device)
        values = rows.trainable_tokens_delta[name]
        weight.index_copy_(0, index, values.detach().to(dtype))
        learned.append((index, values))

    def project(hidden: Tensor) -> Tensor:
        logits = functional.linear(hidden.to(dtype), weight, bias)
        for index, values in learned if torch.is_grad_enabled() else ():
            own = functional.linear(hidden.to(dtype), (values - values.detach()).to(dtype))  # zero, with a gradient
            logits = logits.index_add(-1, index, own)
        return logits

    return project


def autocast_state(tensor: Tensor) -> tuple[str, bool, torch.dtype]:
    kind = tensor.device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    _, enabled, dtype = autocast_state(tensor)
    return dtype if enabled else None


_FOUND: weakref.WeakKeyDictionary[nn.Module, tuple[nn.Module, OutputHead | None]] = weakref.WeakKeyDictionary()


def find_head(model: nn.Module, arguments: dict[str, Any]) -> OutputHead | None:
    """The head of a transformers causal LM, if its logits are what that head makes of the hidden states that it reads.

    Looked at once for each model and head: the model's logits for a few tokens of ``arguments`` against the head's.
    None means that the logits have to be asked for whole: a head that is sharded, is no module of its own, or whose
    logits something else is done to.
    """
    module = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(module, nn.Module):
        return None
    known = _FOUND.get(model)
    if known is None or known[0] is not module:
        known = _FOUND[model] = (module, _prove(model, module, arguments))
    return known[1]


def _prove(model: nn.Module, module: nn.Module, arguments: dict[str, Any]) -> OutputHead | None:
    if any(type(p.data) is not Tensor for p in module.parameters()):  # sharded, or kept in another form
        return None
    config: Any = model.config
    config = config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    scales = [*([1 / divisor] if divisor else []), *([float(factor)] if factor else []), 1.0]
    # What the configuration names comes first: small logits would fit without a cap as well, and larger ones not.
    heads = [OutputHead(module, scale, c) for scale in dict.fromkeys(scales) for c in dict.fromkeys((cap, None))]
    of_the_row = ("position_ids", "logits_to_keep", "segment_lengths", "segment_paths")
    short = {name: value for name, value in arguments.items() if name not in of_the_row}
    short["input_ids"] = arguments["input_ids"][:, :_PROOF_TOKENS]  # one record
    try:
        with evaluating(model):
            with _reading(module) as read:
                logits = model(**short).logits
            if len(read) != 1 or read[0].shape[:-1] != logits.shape[:-1]:
                return None
            tolerance = 1e-5 if logits.dtype == torch.float32 and autocast_dtype(logits) is None else 1e-2
            fitting = [
                head
                for head in heads
                if (found := head.prepare()(read[0])).shape == logits.shape
                and float((found - logits).abs().max()) <= tolerance * float(logits.abs().max().clamp_min(1e-30))
            ]
            if not fitting:
                return None
            with passed_through(module) as seen:  # nothing after the head may mind what it gets
                model(**short)
            return fitting[0] if len(seen) == 1 and torch.equal(seen[0], read[0]) else None
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


@contextlib.contextmanager
def _reading(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given, while it works as ever."""
    seen: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        yield seen


class _HandsOn:
    """The forward of a module that hands on what the threads of ``seen`` give it, and works as ever for others."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own, self.before = module, module.forward, vars(module).get("forward")
        self.seen: dict[int, list[Tensor]] = {}

    def __call__(self, hidden: Tensor, *more: Any, **options: Any) -> Any:
        seen = self.seen.get(threading.get_ident())
        if seen is None:
            return self.own(hidden, *more, **options)
        seen.append(hidden)
        return hidden

    def leave(self, thread: int) -> None:
        del self.seen[thread]
        if not self.seen:
            del self.module.forward
            if self.before is not None:
                self.module.forward = self.before


_LOCK = threading.Lock()


@contextlib.contextmanager
def passed_through(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given by this thread, while it hands that on and computes nothing."""
    seen: list[Tensor] = []
    thread = threading.get_ident()
    with _LOCK:
        forward = module.forward if isinstance(module.forward, _HandsOn) else _HandsOn(module)
        module.forward = forward
        forward.seen[thread] = seen
    try:
        yield seen
    finally:
        with _LOCK:
            forward.leave(thread)
