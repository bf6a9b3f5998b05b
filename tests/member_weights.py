"""Weights of members as a fit computes with them, live, against the same weights folded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stackctl.engine.evaluation.weighted_members import attached, read_factors
from stackctl.engine.loss.logits import supervised_loss


class Weights:
    """Weights that are there to be learned."""

    def __init__(self, values: list[float]) -> None:
        self.parameter = torch.nn.Parameter(torch.tensor(values))

    def __call__(self) -> torch.Tensor:
        return self.parameter


def check_live_weights(
    h: Any, members: dict[str, float], tokens: torch.Tensor, per: Any = "member", *, smooth: bool = True
) -> set[str]:
    """The loss of live weights is that of folded ones, and its gradient the slope along the first member's weight.

    A loss that jumps has no slope (``smooth``). Returns the names of the groups that have a weight.
    """
    stacked, plan, count = h.load(), h.plan("+".join(members)), tokens.shape[1]
    batch = {
        "input_ids": tokens, "position_ids": torch.arange(count)[None], "keep": torch.arange(count - 1),
        "labels": tokens[0, 1:],
    }  # fmt: skip
    weighted = read_factors(plan, per)
    names = [plan.members[member].adapter for member, _ in weighted.groups]
    now = Weights([members[name] for name in names])
    before = float(supervised_loss(stacked.model, batch))
    with attached(stacked.model, weighted, now):
        loss = supervised_loss(stacked.model, batch)
        loss.backward()
    assert float(supervised_loss(stacked.model, batch)) == before, "and the base is as it was"
    (first, value), *others = members.items()
    found, step = [], 3e-3
    for weight in (value, value + step, value - step):
        stacked.use(h.plan("+".join(f"{name}:{at}" for name, at in [(first, weight), *others])))
        found.append(float(supervised_loss(stacked.model, batch).detach().double()))
    assert float(loss.detach()) == pytest.approx(found[0], rel=1e-5)
    gradient = now.parameter.grad
    assert gradient is not None and bool((gradient != 0).all())
    if smooth:
        own = [number for number, name in enumerate(names) if name == first]
        slope = (found[1] - found[2]) / (2 * step)
        assert float(gradient[own].sum()) == pytest.approx(slope, rel=2e-2, abs=3e-2)
    return {name for _, name in weighted.groups}
