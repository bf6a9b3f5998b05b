"""The loss of every supervised token from hidden states, a chunk of tokens at a time, so that no logits are ever whole.

Logits in float32, their softmax and its gradient are three times tokens × vocabulary: most of a step's memory at
today's vocabularies. Here a chunk of them exists at a time, in the forward pass, where the gradient of the hidden
states is computed at once: for one token it is upstream · (softmax - one-hot) · W, of which only the upstream is not
known yet, a number for each token. Where the head itself has something to learn, the chunks are computed again in the
backward pass. The idea is that of Cut Your Losses (https://arxiv.org/abs/2411.09009) and of Liger's fused kernel.

Whether logits really are what a head makes of hidden states is looked at and not believed: see :func:`find_head`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from stackctl.engine.models import evaluating
from stackctl.machine.memory_estimate import LOSS_CHUNK

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

    def prepare(self) -> Projection:
        """A function that makes logits of a chunk; what autocast would cast for each chunk is cast once."""
        project: Projection = self.module
        rows = getattr(self.module, "token_adapter", None)
        if type(self.module) is nn.Linear and not self.parameters:
            weight: Tensor = self.module.weight
            bias: Tensor | None = self.module.bias
            dtype = _autocast_dtype(weight)
            if dtype is not None:
                weight, bias = weight.to(dtype), bias.to(dtype) if bias is not None else None

            def project(hidden: Tensor) -> Tensor:
                return functional.linear(hidden.to(weight.dtype), weight, bias)
        elif rows is not None:
            project = _with_rows(rows)

        def logits(hidden: Tensor) -> Tensor:
            found = project(hidden)
            found = found if self.scale == 1.0 else found * self.scale
            return found if self.soft_cap is None else self.soft_cap * torch.tanh(found / self.soft_cap)

        return logits


def _with_rows(rows: Any) -> Projection:
    """The head under PEFT's rows of single tokens: put into the weight once, not for each chunk.

    The same logits, bit for bit; gradients of the rows come from their own logits alone, not by way of a gradient of
    the whole weight.
    """
    layer = rows.get_base_layer()
    active = [] if rows.disable_adapters else list(rows.active_adapters)
    dtype = _autocast_dtype(layer.weight) or layer.weight.dtype
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


@dataclass(frozen=True)
class TokenLosses:
    """Of K supervised tokens: cross-entropy (K,) in float32, and whether each was the likeliest (K,)."""

    losses: Tensor
    correct: Tensor


class Target(Protocol):
    """What logits are held against."""

    def __call__(self, logits: Tensor, part: slice, project: Projection) -> Tensor:
        """The losses (c,) of float32 logits (c, vocabulary) of a ``part`` of the tokens, which become their gradient.

        ``project`` is the head as it makes those logits.
        """
        ...


def token_losses(head: OutputHead, hidden: Tensor, labels: Tensor, target: Target | None = None) -> TokenLosses:
    """Cross-entropy of each label (K,) under the logits that ``head`` makes of hidden states (K, d).

    With a ``target`` the losses are what that makes of the logits. Differentiable in ``hidden`` and in what of the head
    is trained. The extra memory is that of one chunk.
    """
    losses, correct = _TokenLosses.apply(hidden, labels, target or _Labels(labels), head, *head.parameters)
    return TokenLosses(losses, correct)


@dataclass(frozen=True)
class _Labels:
    """The tokens (K,) that come."""

    labels: Tensor

    def __call__(self, logits: Tensor, part: slice, _: Projection) -> Tensor:
        return _cross_entropy(logits, self.labels[part])


@dataclass(frozen=True)
class TeacherHidden:
    """The probabilities that the head makes of a teacher's hidden states (K, d); ``speaking`` switches to its head."""

    hidden: Tensor
    speaking: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def __call__(self, logits: Tensor, part: slice, project: Projection) -> Tensor:
        with torch.no_grad(), self.speaking():
            theirs = project(self.hidden[part]).float()
        return divergence(logits, theirs)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, target: Target, head: OutputHead, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits_of = head.prepare()
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        correct = torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
        ahead = ctx.needs_input_grad[0] and not parameters
        unit = torch.empty_like(hidden) if ahead else None
        for part in _chunks(labels.numel(), head):
            with torch.set_grad_enabled(ahead):
                inner = hidden[part].detach().requires_grad_(ahead)
                logits = logits_of(inner)
            values = logits.detach().float()  # overwritten: a graph that had kept them would say so
            correct[part] = values.argmax(-1) == labels[part]
            losses[part] = target(values, part, logits_of)
            if unit is not None:
                (unit[part],) = torch.autograd.grad(logits, inner, values.to(logits.dtype))
            del logits, values
        ctx.head, ctx.target, ctx.autocast = head, target, _autocast_state(hidden)
        ctx.save_for_backward(*([unit] if unit is not None else [hidden, labels] if parameters else []))
        ctx.ahead = ahead
        ctx.mark_non_differentiable(correct)
        return losses, correct

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.ahead:
            (unit,) = ctx.saved_tensors
            return unit * upstream[:, None].to(unit.dtype), None, None, None
        hidden, labels = ctx.saved_tensors
        parameters = ctx.head.parameters
        sums = [torch.zeros_like(parameter) for parameter in parameters]
        gradient = torch.empty_like(hidden)
        device, enabled, dtype = ctx.autocast
        with torch.autocast(device, dtype, enabled=enabled), torch.enable_grad():
            logits_of = ctx.head.prepare()
            for part in _chunks(labels.numel(), ctx.head):
                inner = hidden[part].detach().requires_grad_(True)
                logits = logits_of(inner)
                values = logits.detach().float()
                ctx.target(values, part, logits_of)
                values *= upstream[part, None]
                found = torch.autograd.grad(logits, [inner, *parameters], values.to(logits.dtype))
                gradient[part] = found[0]
                for total, one in zip(sums, found[1:], strict=True):
                    total += one
        return gradient, None, None, None, *sums


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (c,) of float32 logits (c, vocabulary), which become its gradient: softmax - one-hot."""
    place = labels[:, None]
    largest = logits.amax(-1, keepdim=True)  # (c, 1)
    own = logits.gather(-1, place) - largest
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    losses = total.log() - own
    logits.div_(total)
    logits.scatter_add_(-1, place, torch.full_like(losses, -1.0))
    return losses[:, 0]


def divergence(logits: Tensor, theirs: Tensor) -> Tensor:
    """KL(p || q) in nats (c,) of q by float32 logits (c, vocabulary) from p by ``theirs``; both are overwritten.

    ``logits`` become the gradient of it, q - p.
    """
    theirs.sub_(torch.logsumexp(theirs, -1, keepdim=True))  # log p
    logits.sub_(torch.logsumexp(logits, -1, keepdim=True))  # log q
    p = theirs.exp()
    losses = (p * theirs.sub_(logits)).sum(-1)
    logits.exp_().sub_(p)
    return losses


def _chunks(tokens: int, head: OutputHead) -> Iterator[slice]:
    """Slices of the tokens, each with at most ``LOSS_CHUNK`` bytes of logits."""
    step = max(1, LOSS_CHUNK // (4 * _vocabulary(head.module)))
    for start in range(0, tokens, step):
        yield slice(start, start + step)


def _vocabulary(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 0)) or max((p.shape[0] for p in module.parameters()), default=1)


def _autocast_state(tensor: Tensor) -> tuple[str, bool, torch.dtype]:
    kind = tensor.device.type
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    _, enabled, dtype = _autocast_state(tensor)
    return dtype if enabled else None


# -- finding the head ---------------------------------------------------------------------------------------------


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
    scales = {1.0, *([1 / divisor] if divisor else []), *([float(factor)] if factor else [])}
    heads = [OutputHead(module, scale, c) for scale in scales for c in dict.fromkeys((None, cap))]
    short = {name: value for name, value in arguments.items() if name not in ("position_ids", "logits_to_keep")}
    short["input_ids"] = arguments["input_ids"][:, :_PROOF_TOKENS]
    if "segment_lengths" in short:
        short["segment_lengths"] = [short["input_ids"].shape[1]]
    try:
        with evaluating(model):
            with _reading(module) as read:
                logits = model(**short).logits
            if len(read) != 1 or read[0].shape[:-1] != logits.shape[:-1]:
                return None
            tolerance = 1e-5 if logits.dtype == torch.float32 and _autocast_dtype(logits) is None else 1e-2
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
    handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        handle.remove()


@contextlib.contextmanager
def passed_through(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module is given, while it hands that on and computes nothing."""
    seen: list[Tensor] = []

    def hand_on(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(hidden)
        return hidden

    own = module.__dict__.get("forward")
    module.forward = hand_on  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]
