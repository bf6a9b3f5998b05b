"""Whether values are finite numbers, and what is said where they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from stackctl.core.errors import VerificationFailed
from stackctl.engine import algebra


def without_ruled_out(logits: Tensor) -> Tensor:
    """Logits with zeros where a model writes the lowest number there is, so that a token is never taken, as Chameleon
    does with images: beside that number every difference is none."""
    return logits.masked_fill(logits == torch.finfo(logits.dtype).min, 0.0)


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    One fast pass: a sum carries both along. Only where the sum is not finite, which finite values can overflow to,
    is every value looked at, many times as slow.
    """
    if not tensor.is_floating_point() or tensor.element_size() == 1:
        return True
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def misfit(name: str, dtype: str) -> VerificationFailed:
    """What is said of values that are no numbers in ``dtype``: the widest that there is takes smaller weights alone."""
    hint = "give the members smaller weights" if dtype == "float32" else "use --dtype float32"
    return VerificationFailed(f"{name} does not fit {dtype}", hint=hint)


@contextlib.contextmanager
def decomposing(name: str, factors: Sequence[algebra.Factors]) -> Iterator[None]:
    """Around decompositions of what a module's factors make, which fail in many words where that is no number.

    Raises:
        VerificationFailed: it does not fit float32.
    """
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        largest = max(float(a.abs().max()) * float(b.abs().max()) * abs(scale) for a, b, scale in factors)
        if largest <= torch.finfo(torch.float32).max:
            raise
        raise misfit(name, "float32") from error
