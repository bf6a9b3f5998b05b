"""How an answer is drawn: what a person asked for, and the seed of each prompt."""

from __future__ import annotations

import hashlib
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


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
