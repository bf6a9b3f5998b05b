"""The closed-form correction is the minimum of what it says it minimises, worked out in float64 without its factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stackctl.engine.training.correction import corrected, input_moments

OUT, IN, RANK, TOKENS = 7, 11, 3, 40


def made(seed: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor, float]]]:
    torch.manual_seed(seed)
    a, b = torch.randn(RANK, IN, dtype=torch.float64), torch.randn(OUT, RANK, dtype=torch.float64)
    inputs = torch.randn(TOKENS, IN, dtype=torch.float64) * torch.logspace(-1, 1, IN, dtype=torch.float64)
    difference = [
        (torch.randn(k, IN, dtype=torch.float64), torch.randn(OUT, k, dtype=torch.float64), weight)
        for k, weight in ((2, 0.7), (4, -1.3))
    ]
    return a, b, inputs, difference


def moment(a: Tensor, inputs: Tensor) -> Tensor:
    """R by the hook, of inputs that come in two rows."""
    layer = nn.Linear(IN, 1, bias=False, dtype=torch.float64)
    with input_moments({"layer": (layer, a)}) as moments:
        layer(inputs[None, :25])
        layer(inputs[None, 25:])
    layer(inputs[None])  # not watched
    return moments["layer"]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_it_is_the_least_squares_solution(seed: int, ridge: float) -> None:
    a, b, inputs, difference = made(seed)
    scale = 1.7
    r = moment(a, inputs)
    assert torch.allclose(r, inputs.T @ (inputs @ a.T), rtol=1e-12)
    found = corrected(a, b, scale, r, difference, ridge)
    whole = sum(weight * (d_b @ d_a) for d_a, d_b, weight in difference)
    read = inputs @ a.T  # (T, r)
    strength = (ridge * (read.T @ read).diagonal().mean()) ** 0.5
    # rows of the data, then rows of the ridge: minimise ‖s (B' - B) A X - D X‖² + λ s² ‖B' - B‖²
    left = torch.cat([read, strength * torch.eye(RANK, dtype=torch.float64)])
    right = torch.cat([inputs @ whole.T, torch.zeros(RANK, OUT, dtype=torch.float64)])
    wanted = b + torch.linalg.lstsq(left, right).solution.T / scale
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9)


def test_what_the_adapter_can_say_is_made_up_for_to_the_last_digit() -> None:
    a, b, inputs, _ = made(0)
    planted = torch.randn(OUT, RANK, dtype=torch.float64)
    found = corrected(a, b, 2.0, moment(a, inputs), [(a, planted, 0.5)], 1e-14)
    assert torch.allclose(2.0 * found, 2.0 * b + 0.5 * planted, rtol=1e-9)


def test_without_a_change_or_inputs_nothing_is_corrected() -> None:
    a, b, inputs, difference = made(1)
    assert torch.equal(corrected(a, b, 1.0, moment(a, inputs), []), b)
    assert torch.equal(corrected(a, b, 1.0, moment(a, 0 * inputs), difference), b)
    cancels = [*difference, *((d_a, d_b, -weight) for d_a, d_b, weight in difference)]
    assert torch.allclose(corrected(a, b, 1.0, moment(a, inputs), cancels), b, atol=1e-12)
