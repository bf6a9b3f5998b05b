"""Dropout of the adapter in training: what torch's has, drawn by the computation that it belongs to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from stackctl.engine.noise import OwnDropout, draw_seeds, drawn_from


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 0.9, 1e-6, 1 - 1e-9])
def test_a_share_is_dropped_and_the_rest_made_larger_by_it(p: float) -> None:
    dropout, x = OwnDropout(p), torch.rand(1001, 999) + 1
    x.requires_grad_()
    with drawn_from(0):
        made = dropout(x)
    (gradient,) = torch.autograd.grad(made.sum(), x)
    kept = made != 0
    share, number = float(kept.double().mean()), x.numel()
    assert abs(share - dropout.keeps) <= 5 * math.sqrt(dropout.keeps * (1 - dropout.keeps) / number)
    assert abs(dropout.keeps - (1 - p)) <= 2**-16
    assert torch.equal(made, torch.where(kept, x / dropout.keeps, 0.0))
    assert torch.equal(gradient, torch.where(kept, 1 / dropout.keeps, 0.0))
    assert torch.equal(dropout.eval()(x), x)


def test_neighbours_are_dropped_independently() -> None:
    with drawn_from(3):
        kept = OwnDropout(0.5).mask(torch.empty(64, 4096)).double() - 0.5
    for shift in (1, 2, 3, 4, 32):
        for moved in (kept.roll(shift, 1), kept.roll(shift, 0)):
            assert abs(float((kept * moved).mean())) < 5 * 0.25 / math.sqrt(kept.numel())


def test_it_is_drawn_by_the_seed_of_a_computation_or_by_torch_itself() -> None:
    dropout, x = OwnDropout(0.5), torch.ones(7, 33)

    def drawn(seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        with drawn_from(seed):
            return dropout(x), dropout(x)

    (first, second), again, (other, _) = drawn(1), drawn(1), drawn(2)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second) and not torch.equal(first, other)
    state = torch.get_rng_state()
    one = drawn(None)[0]
    assert not torch.equal(torch.get_rng_state(), state)
    torch.set_rng_state(state)
    assert torch.equal(drawn(None)[0], one), "a run that goes on draws what it would have drawn"
    assert len(set(draw_seeds(1000))) == 1000


def test_it_is_a_dropout_of_torch_s() -> None:
    """By which other parts know what draws noise."""
    assert isinstance(OwnDropout(0.1), nn.Dropout)
