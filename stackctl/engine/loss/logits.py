"""Logits and loss of a collated micro-batch, computed only where a label is, and how far two logits lie apart."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from stackctl.engine.data.rows import split_row, starts_of
from stackctl.engine.data.shared_beginnings import SharedRow, share_beginnings
from stackctl.engine.loss.output_head import OutputHead, find_head, passed_through
from stackctl.engine.loss.segment_attention import OWN
from stackctl.engine.loss.token_losses import TokenLosses, token_losses
from stackctl.engine.models import evaluating
from stackctl.engine.tensors import without_ruled_out

_WORTH_IT = 32
"""Beginnings stand in a row once where that spares one token in so many."""
_NOISE = re.compile("drop|jitter")
"""In the names of how much noise modules add in training."""


def supervised_loss(model: nn.Module, inputs: dict[str, Tensor], *, one_by_one: bool = False) -> Tensor:
    """Summed cross-entropy of a collated micro-batch; logits are computed only where a label is.

    ``inputs``: input_ids and position_ids (1, T), keep (K,), labels (K,), as :func:`stackctl.engine.data.rows.collate`
    makes them. ``one_by_one`` runs the examples one by one, for models that cannot keep documents in one row apart.
    """
    return supervised_token_losses(model, inputs, one_by_one=one_by_one).losses.sum()


def supervised_token_losses(model: nn.Module, inputs: dict[str, Tensor], *, one_by_one: bool = False) -> TokenLosses:
    """Cross-entropy of each supervised token (K,), and in evaluation whether it was the likeliest; arguments as above.

    Logits exist a chunk at a time, see :mod:`stackctl.engine.loss.token_losses`; whole ones where a model's head is not
    all that makes them.
    """
    if one_by_one and (parts := split(inputs)):
        each = [supervised_token_losses(model, part) for part in parts]
        counted = [part.correct for part in each if part.correct is not None]
        return TokenLosses(torch.cat([part.losses for part in each]), torch.cat(counted) if counted else None)
    return losses_of_hidden(*supervised_hidden(model, inputs), inputs["labels"])


def losses_of_hidden(head: OutputHead | None, hidden: Tensor, labels: Tensor) -> TokenLosses:
    """The same of what :func:`supervised_hidden` found."""
    if head is not None:
        return token_losses(head, hidden, labels)
    logits = hidden.float()
    losses = functional.cross_entropy(logits, labels, reduction="none")
    return TokenLosses(losses, logits.detach().argmax(-1) == labels)


def supervised_hidden(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[OutputHead | None, Tensor]:
    """A model's head, and what it makes logits of where a label is (K, d); without such a head the logits themselves.

    ``inputs`` are as above; of their labels nothing is read.
    """
    inner = causal_lm(model)
    (arguments, keep), keeps = _arguments(inner, inputs), _takes_positions(inner)
    head = find_head(inner, arguments)
    if head is None:
        return None, _logits(model, arguments, keep)
    with passed_through(head.module) as seen:
        model(**arguments, **({"logits_to_keep": keep} if keeps else {}))
    return head, seen[0].flatten(0, -2) if keeps else seen[0].flatten(0, -2)[keep]  # (K, d)


def supervised_logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The logits (K, vocabulary) at the positions that predict a supervised token."""
    return _logits(model, *_arguments(causal_lm(model), inputs))


def _logits(model: nn.Module, arguments: dict[str, Any], keep: Tensor) -> Tensor:
    if _takes_positions(causal_lm(model)):
        logits: Tensor = model(**arguments, logits_to_keep=keep).logits[0]
        return logits
    whole: Tensor = model(**arguments).logits
    return whole[0, keep]


def _takes_positions(inner: nn.Module) -> bool:
    """Whether a model computes logits at chosen positions alone."""
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _arguments(inner: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor]:
    """What a model's forward is given for a row of records, and the places in it that have a label behind them (K,)."""
    ids, positions, keep = inputs["input_ids"], inputs["position_ids"], inputs["keep"]
    starts = starts_of(positions)
    arguments: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if inner.config._attn_implementation in OWN:
        arguments["segment_lengths"] = [end - start for start, end in itertools.pairwise(starts)]
        if shared := _shared(inner, ids, starts):
            tokens, places = (torch.tensor(numbers, device=ids.device) for numbers in (shared.tokens, shared.places))
            ids, positions, keep = ids[:, tokens], positions[:, tokens], places[keep]
            arguments |= {"segment_lengths": shared.lengths, "segment_paths": shared.paths}
    arguments["input_ids"] = ids
    # A record alone in its row has the positions that the model gives it: not all of them count from 0.
    if "position_ids" in inspect.signature(inner.forward).parameters and len(starts) > 2:
        arguments["position_ids"] = positions
    return arguments, keep


def _shared(inner: nn.Module, ids: Tensor, starts: list[int]) -> SharedRow | None:
    """The records of a row with what several of them begin with once, where that is worth it.

    Dropout, and any other noise, is drawn for each record by itself.
    """
    if len(starts) < 3:
        return None
    all_ids = ids[0].tolist()
    row = share_beginnings([all_ids[start:end] for start, end in itertools.pairwise(starts)])
    if (len(all_ids) - len(row.tokens)) * _WORTH_IT < len(all_ids):
        return None
    return None if inner.training and draws_noise(inner) else row


def draws_noise(model: nn.Module, besides: Sequence[nn.Module] = ()) -> bool:
    """Whether something in a model is random in training, ``besides`` some of its modules."""
    known = set(besides)
    return any(_draws(module) for module in model.modules() if module not in known)


def _draws(module: nn.Module) -> bool:
    """Whether a module draws noise in training: as a dropout, or by a function that is given one of its numbers, as
    attention and routers are."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    return bool(_noises(module))


def _noises(of: object) -> list[str]:
    """The attributes of a module, or of a configuration, that say how much noise is drawn."""
    return [name for name, value in vars(of).items() if type(value) is float and value > 0 and _NOISE.search(name)]


def without_noise(model: nn.Module) -> None:
    """Let nothing in a model be random in training any more; some modules read how much in their configuration."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for of in (module, getattr(module, "config", None)):
            for name in _noises(of) if of is not None else ():
                setattr(of, name, 0.0)


def causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model under whatever wraps it (DDP, PEFT)."""
    within: Any = getattr(model, "module", model)
    # Asked for by its method, not by its class: importing PEFT takes seconds, which eval can save.
    inside = getattr(within, "get_base_model", None)
    base: PreTrainedModel = inside() if inside else within
    return base


def split(inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The examples of a collated row, each as a row of its own; without those of which nothing is learned."""
    return [part for part in split_row(inputs, 1) if part["labels"].numel()]


def probe(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits (T, vocabulary) for tokens (1, T), in evaluation mode, in float32 on the CPU."""
    with evaluating(model):
        device = next(model.parameters()).device
        logits: Tensor = model(input_ids=tokens.to(device), use_cache=False).logits[0]
        return without_ruled_out(logits).float().cpu()


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
