"""Noise that a computation draws by itself, so that it does not depend on what other threads compute meanwhile."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

_LEVELS = 2**16
_LOWEST = -(2**15)
_OWN = threading.local()


@contextlib.contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """While the body runs, the noise of the thread that calls comes from this seed; with None from torch's own."""
    _OWN.generator = None if seed is None else _generator(seed)
    try:
        yield
    finally:
        _OWN.generator = None


def draw_seeds(count: int) -> list[int]:
    """Seeds by torch's own generator, whose state a run saves and restores."""
    found: list[int] = torch.randint(2**62, (count,)).tolist()
    return found


class OwnDropout(nn.Dropout):
    """Dropout on a CPU whose noise is drawn by :func:`drawn_from`. Its share is rounded to one in 65,536.

    numpy's generator takes a tenth of the time of torch's ``bernoulli_``, which is that of half a step.
    """

    def __init__(self, p: float) -> None:
        super().__init__(p)
        self._dropped = min(round(p * _LEVELS), _LEVELS - 1)

    @property
    def keeps(self) -> float:
        """The share that is kept."""
        return 1.0 - self._dropped / _LEVELS

    def mask(self, x: Tensor) -> Tensor:
        """One for each value of ``x`` that is kept, else zero, in its shape: bytes, by which torch multiplies four
        times as fast as by booleans."""
        generator = getattr(_OWN, "generator", None) or _generator(*draw_seeds(1))
        drawn = generator.integers(0, 2**64, dtype=np.uint64, size=-(-x.numel() // 4)).view(np.int16)
        kept = drawn[: x.numel()] >= np.int16(_LOWEST + self._dropped)
        return torch.from_numpy(kept.view(np.uint8)).view(x.shape)

    def forward(self, input: Tensor) -> Tensor:  # as nn.Module calls it
        return input * self.mask(input) / self.keeps if self.training else input


def _generator(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(seed))
