"""How tokens are chosen, and how likely they were.

A row of a batch draws with a generator of its own, so that its neighbours change nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from stackctl.engine.devices import float64
from stackctl.engine.generation.logprobs import TokenBytes, TokenLogprob, not_finite
from stackctl.engine.generation.sampling import Sampling

_COLDEST = 1e-30
"""Logits divided by less overflow; with this the likeliest token is drawn, always."""


def are_numbers(logits: Tensor) -> Tensor:
    """Whether logits (…, vocabulary) are numbers (…): the largest of those among which one is none is none."""
    return logits.amax(-1).isfinite()


class RawLogits(LogitsProcessor):
    """Keeps the logits (rows, vocabulary) of the newest token, before anything else is done to them, and ends the
    answers at such that are no numbers."""

    logits: Tensor

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if not bool(are_numbers(scores).all()):
            raise not_finite()
        self.logits = scores
        return scores


def processors(sampling: Sampling, lengths: list[int], seeds: list[int]) -> LogitsProcessorList:
    """What happens to the logits (rows, vocabulary) of each step. ``lengths`` are those of the prompts.

    The order is transformers' own: penalty, temperature, top-k, top-p, min-p; then the draw.
    """
    made = LogitsProcessorList()
    if sampling.repetition_penalty not in (None, 1.0):
        made.append(_Penalty(sampling.repetition_penalty, lengths))
    if sampling.greedy:
        return made
    made.append(TemperatureLogitsWarper(max(float(sampling.temperature or 1), _COLDEST)))
    if sampling.top_k:
        made.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p is not None and sampling.top_p < 1:
        made.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        made.append(MinPLogitsWarper(sampling.min_p))
    made.append(_Draw(seeds))
    return made


class _Penalty(RepetitionPenaltyLogitsProcessor):
    """The repetition penalty (https://arxiv.org/abs/1909.05858) without the padding.

    The padding token is a token like any other here, often the end of turn: a shorter row would shun it.
    """

    def __init__(self, penalty: Any, lengths: list[int]) -> None:
        super().__init__(penalty)
        self._padding = [max(lengths) - length for length in lengths]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        ids = input_ids.clone()
        for row, padding in zip(ids, self._padding, strict=True):
            row[:padding] = row[padding]
        return super().__call__(ids, scores)


class _Draw(LogitsProcessor):
    """Draws a token for each row and leaves it as the only one possible."""

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Tensor:
        shares = float64(scores).softmax(-1).cumsum(-1)  # (rows, vocabulary)
        points = torch.stack([torch.rand((1,), generator=g, dtype=torch.float64) for g in self._generators])
        # The first token beyond the point; one whose share is zero is never the first.
        drawn = torch.searchsorted(shares, points.to(shares.device) * shares[:, -1:], right=True)
        drawn = drawn.clamp(max=shares.shape[-1] - 1).to(scores.device)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn, 0.0)


def token_logprob(logits: Tensor, token: int, count: int, spell: TokenBytes, first: bool) -> TokenLogprob:
    """How likely a token and the ``count`` likeliest were, by the logits (vocabulary) of their place.

    ``first``: it begins the text.
    """
    logprobs = logits.float().log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return spell.likely(
        (token, float(logprobs[token])), list(zip(ids.tolist(), values.tolist(), strict=True)), first=first
    )
