"""How tokens are chosen. A row of a batch draws with a generator of its own, so that its neighbours change nothing."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Sampling:
    """How to answer: greedy when ``temperature`` is None or 0; ``stop`` are texts that end an answer."""

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    raw: bool = False
    system: str | None = None
    stop: tuple[str, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for the chat template."""
    top_logprobs: int | None = None
    """How likely each token was is wanted, and so many of the most likely at its place."""

    @property
    def greedy(self) -> bool:
        return not self.temperature


def row_seeds(seed: int | None, prompts: Iterable[object]) -> list[int]:
    """A seed for each prompt, by ``seed`` alone: the same prompt draws the same in any company.

    The second of two equal prompts gets another seed, so that asking twice gives two answers.
    """
    asked: Counter[object] = Counter()
    seeds = []
    for prompt in prompts:
        text = f"{seed} {asked[prompt]}".encode()
        seeds.append(secrets.randbits(63) if seed is None else int.from_bytes(hashlib.sha256(text).digest()[:7], "big"))
        asked[prompt] += 1
    return seeds


def processors(sampling: Sampling, lengths: list[int], seeds: list[int]) -> LogitsProcessorList:
    """What happens to the logits (rows, vocabulary) of each step. ``lengths`` are those of the prompts.

    The order is transformers' own: penalty, temperature, top-k, top-p, min-p; then the draw.
    """
    made = LogitsProcessorList()
    if sampling.repetition_penalty not in (None, 1.0):
        made.append(_Penalty(sampling.repetition_penalty, lengths))
    if sampling.greedy:
        return made
    made.append(TemperatureLogitsWarper(float(sampling.temperature or 1)))
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
        shares = scores.double().softmax(-1).cumsum(-1)  # (rows, vocabulary)
        points = torch.stack([torch.rand((1,), generator=g, dtype=torch.float64) for g in self._generators])
        # The first token beyond the point; one whose share is zero is never the first.
        drawn = torch.searchsorted(shares, points.to(shares.device) * shares[:, -1:], right=True)
        return torch.full_like(scores, float("-inf")).scatter(-1, drawn.clamp(max=shares.shape[-1] - 1), 0.0)
