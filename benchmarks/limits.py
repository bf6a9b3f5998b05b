"""What this machine can do at all: products of matrices, and reading of memory. Speeds are shown as shares of these."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_SIZE = 4096
"""Rows and columns of the matrices that are multiplied: far beyond any cache."""
_READ_BYTES = 1 << 30
_TRIES = 5


@dataclass(frozen=True)
class Limits:
    """Operations a second of a product of matrices, in float32 and in bfloat16, and bytes read a second."""

    float32_flops: float
    bfloat16_flops: float
    bytes_read: float

    def __str__(self) -> str:
        return (
            f"{torch.get_num_threads()} threads: {self.float32_flops / 1e9:.0f} GFLOP/s in float32, "
            f"{self.bfloat16_flops / 1e9:.0f} in bfloat16; memory is read at {self.bytes_read / 1e9:.0f} GB/s"
        )


def measure_limits() -> Limits:
    """The best of a few tries: a limit is what the machine does undisturbed."""
    numbers = torch.ones(_READ_BYTES // 4)
    return Limits(_product(torch.float32), _product(torch.bfloat16), _READ_BYTES / _best_seconds(lambda: numbers.sum()))


def training_share(tokens_per_second: float, weights: int, flops: float) -> float:
    """Share of ``flops`` that training on frozen weights uses: four operations a weight and token.

    Two go forward, two carry the gradient back to the layer's input; a frozen weight has no gradient of its own.
    """
    return 4 * weights * tokens_per_second / flops


def decoding_share(tokens_per_second: float, weight_bytes: int, bytes_read: float) -> float:
    """Share of the memory's bandwidth that decoding uses: every weight is read once a token."""
    return weight_bytes * tokens_per_second / bytes_read


def _product(dtype: torch.dtype) -> float:
    left, right = (torch.randn(_SIZE, _SIZE, dtype=dtype) for _ in range(2))
    return 2 * _SIZE**3 / _best_seconds(lambda: left @ right)


def _best_seconds(action: Callable[[], object]) -> float:
    def once() -> float:
        start = time.perf_counter()
        action()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(_TRIES))


def main(_: Sequence[str] = ()) -> None:
    print(measure_limits())
