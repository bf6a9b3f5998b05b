"""A closed-form correction of an adapter for what changed in the stack beneath it.

On a module let D = ΔS₁ - ΔS₂ be what the stack did before and does no more, and s B A the adapter. With A as it is, the
B' that makes up for D on the inputs X (in, T) that the adapter reads minimises

    ‖(D + s B A) X - s B' A X‖² + λ s² ‖B' - B‖²,    so that    s (B' - B) (A R + λ I) = D R,    R = X (A X)ᵀ.

R (in, r) is all that is kept of the inputs, and D is never formed: with its factors everything is of the size of ranks.
It is the ridge regression by which RegMean merges layers (https://arxiv.org/abs/2212.09849), seen through A.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from stackctl.engine.algebra import Factors
from stackctl.engine.devices import float64

_RIDGE = 0.1
"""λ as a share of the mean eigenvalue of A R."""


@contextlib.contextmanager
def input_moments(readers: Mapping[str, tuple[nn.Module, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """R = X (A X)ᵀ, (in, r) in float32, of each module, over all inputs that go by while the body runs.

    ``readers`` are modules by their names, each with the A (r, in) through which its inputs are seen.
    """
    found = {name: torch.zeros_like(a.T) for name, (_, a) in readers.items()}
    with contextlib.ExitStack() as hooks:
        for name, (module, a) in readers.items():
            hooks.enter_context(module.register_forward_pre_hook(functools.partial(_add, found[name], a)))
        yield found


def _add(moment: Tensor, a: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    rows = inputs[0].detach().flatten(0, -2).to(a.dtype)  # (T, in)
    moment.add_(rows.T @ (rows @ a.T))


def corrected(
    a: Tensor, b: Tensor, scale: float, moment: Tensor, difference: Sequence[Factors], ridge: float = _RIDGE
) -> Tensor:
    """B' (out, r) for A (r, in), B (out, r) and s; ``difference`` are the factors of D, ``moment`` is R (in, r).

    In float64; the result has the dtype of B.
    """
    r, own = float64(moment), float64(b)
    gram = float64(a) @ r  # (r, r), symmetric up to rounding
    gram = (gram + gram.T) / 2
    mean = float(gram.diagonal().mean())
    if not mean > 0 or not difference:
        return b.clone()
    gram.diagonal().add_(ridge * mean)
    missed = torch.zeros_like(own)  # D R, (out, r)
    for d_a, d_b, weight in difference:
        missed += float64(d_b) @ (float64(d_a) @ r) * weight
    solved: Tensor = torch.linalg.solve(gram, missed, left=False)
    return (own + solved / scale).to(b.dtype).to(b.device)
