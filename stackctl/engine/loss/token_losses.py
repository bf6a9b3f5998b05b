"""The loss of every supervised token from hidden states, a chunk of tokens at a time, so that no logits are ever whole.

Logits in float32, their softmax and its gradient are three times tokens × vocabulary: most of a step's memory at
today's vocabularies. Here a chunk of them exists at a time, in the forward pass, where the gradient of the hidden
states is computed at once: for one token it is upstream · (softmax - one-hot) · W, of which only the upstream is not
known yet, a number for each token. Where the head itself has something to learn, the chunks are computed again in the
backward pass. The idea is that of Cut Your Losses (https://arxiv.org/abs/2411.09009) and of Liger's fused kernel.

The head itself is in :mod:`stackctl.engine.loss.output_head`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stackctl.engine.loss.output_head import OutputHead, Projection, autocast_state
from stackctl.machine.memory_estimate import LOSS_CHUNK


@dataclass(frozen=True)
class TokenLosses:
    """Of K supervised tokens: cross-entropy (K,) in float32, and whether each was the likeliest (K,).

    The latter is looked for only where no gradients are wanted: training does not ask.
    """

    losses: Tensor
    correct: Tensor | None


Target = Callable[[Tensor, slice, Projection], Tensor]
"""The losses (c,) of float32 logits (c, vocabulary) of a part of the tokens, which become their gradient; the
projection is the head as it makes those logits."""


def token_losses(head: OutputHead, hidden: Tensor, labels: Tensor, target: Target | None = None) -> TokenLosses:
    """Cross-entropy of each label (K,) under the logits that ``head`` makes of hidden states (K, d).

    With a ``target`` the losses are what that makes of the logits. Differentiable in ``hidden`` and in what of the head
    is trained. The extra memory is that of one chunk.
    """
    counted = None if torch.is_grad_enabled() else torch.empty(labels.shape, dtype=torch.bool, device=hidden.device)
    own = _cross_entropy if counted is None else _losses_alone
    target = target or (lambda logits, part, _: own(logits, labels[part]))
    losses = _TokenLosses.apply(hidden, labels, target, head, counted, *head.parameters)
    return TokenLosses(losses, counted)


def taught_by(hidden: Tensor, speaking: Callable[[], contextlib.AbstractContextManager[None]]) -> Target:
    """The probabilities that the head makes of a teacher's hidden states (K, d); ``speaking`` switches to its head."""

    def target(logits: Tensor, part: slice, project: Projection) -> Tensor:
        with torch.no_grad(), speaking():
            theirs = project(hidden[part]).float()
        return divergence(logits, theirs)

    return target


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        target: Target,
        head: OutputHead,
        correct: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        alone = head.alone()
        logits_of = alone.project if alone else head.prepare()
        losses = torch.empty(labels.shape, dtype=torch.float32, device=hidden.device)
        ahead = ctx.needs_input_grad[0] and not parameters
        unit = torch.empty_like(hidden) if ahead else None
        for part in _chunks(labels.numel(), head):
            if alone:
                values = alone.logits(hidden[part])
            else:
                with torch.set_grad_enabled(ahead):
                    inner = hidden[part].detach().requires_grad_(ahead)
                    logits = logits_of(inner)
                values = logits.detach().float()  # overwritten: a graph that had kept them would say so
            if correct is not None:
                correct[part] = values.argmax(-1) == labels[part]
            losses[part] = target(values, part, logits_of)
            if unit is None:
                continue
            if alone:
                unit[part] = alone.gradient(values)
            else:
                (unit[part],) = torch.autograd.grad(logits, inner, values.to(logits.dtype))
                del logits, values
        ctx.head, ctx.target, ctx.autocast = head, target, autocast_state(hidden)
        ctx.save_for_backward(*([unit] if unit is not None else [hidden, labels] if parameters else []))
        ctx.ahead = ahead
        return losses

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if ctx.ahead:
            (unit,) = ctx.saved_tensors
            return unit * upstream[:, None].to(unit.dtype), None, None, None, None
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
        return gradient, None, None, None, None, *sums


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (c,) of float32 logits (c, vocabulary), which become its gradient: softmax - one-hot."""
    losses = _losses_alone(logits, labels)
    logits.exp_().scatter_add_(-1, labels[:, None], torch.full_like(losses, -1.0)[:, None])
    return losses


def _losses_alone(logits: Tensor, labels: Tensor) -> Tensor:
    """The same without the gradient: logits become their own logarithms of probabilities."""
    return -_log_softmax(logits).gather(-1, labels[:, None])[:, 0]


def _log_softmax(logits: Tensor) -> Tensor:
    """Logits (c, vocabulary) become their own logarithms of probabilities."""
    return torch.log_softmax(logits, -1, out=logits)


def divergence(logits: Tensor, theirs: Tensor) -> Tensor:
    """KL(p || q) in nats (c,) of q by float32 logits (c, vocabulary) from p by ``theirs``; both are overwritten.

    ``logits`` become the gradient of it, q - p.
    """
    _log_softmax(theirs)
    _log_softmax(logits)
    p = theirs.exp()
    losses = (p * theirs.sub_(logits)).sum(-1)
    logits.exp_().sub_(p)
    return losses


def _chunks(tokens: int, head: OutputHead) -> Iterator[slice]:
    """Slices of the tokens, each with at most ``LOSS_CHUNK`` bytes of logits."""
    known = int(getattr(head.module, "out_features", 0))
    vocabulary = known or max((p.shape[0] for p in head.module.parameters()), default=1)
    step = max(1, LOSS_CHUNK // (4 * vocabulary))
    for start in range(0, tokens, step):
        yield slice(start, start + step)
