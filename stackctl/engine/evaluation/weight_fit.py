"""The weights of a stack, learned from data while base and factors stay as they are, and judged on records kept apart.

A stack is a smooth function of a handful of numbers, of which L-BFGS finds the best: LoRA Soups (arXiv:2410.13025)
learns a weight for each member and layer, LoraHub (arXiv:2307.13269) one for each member. Layers differ a hundredfold
in what data tell of them, so that after the first steps they are measured in units of that, the empirical Fisher
information: of the layers of a small model with six, thirty steps then find what takes nearly sixty without.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stackctl.core.errors import Failed, Usage
from stackctl.engine.at_once import AtOnce
from stackctl.engine.data.examples import Example, supervised_count
from stackctl.engine.data.rows import collate
from stackctl.engine.evaluation.scoring import DataSet, Scoring, compute_rows, rows_of
from stackctl.engine.evaluation.weighted_members import Group, WeightedFactors, attached
from stackctl.engine.loss.logits import supervised_token_losses
from stackctl.engine.models import StackedModel

_FEW_TOKENS, _MANY_TOKENS, _WORK = 8_192, 262_144, 1e12
"""Tokens of a data set that are learned from: the weights are few, and more data only makes each step longer. As many
as make a step, over a model of so many parameters, a matter of seconds."""
_BOUND = 3.0
"""No weight gets larger than this, or than twice the one it began with."""
_ROUND = 12
"""Steps after which the information is looked at again."""
_LOOKS = 3
"""Looks at the data that a step may take, on average; where the loss is rugged one takes a dozen."""
_RIDGE = 1e-4
"""Of the mean information of a weight: what is known of every one."""
_FLAT = 1e-6
"""A gradient at which the loss is as small as it gets."""
_SAME = 2e-8
"""Losses that differ by less are the same: float32 tells no finer ones apart."""
_DIGITS = 4
"""Of a weight behind the point: what is judged is what is written."""


def halve(data: DataSet, seed: int) -> tuple[DataSet, DataSet]:
    """Half of the records, drawn by a seed, to learn from, and the others to judge by; no record is in both.

    Raises:
        Usage: there is only one record with anything to learn.
    """
    numbers = sorted(set(data.owners))
    if len(numbers) < 2:
        raise Usage(
            f"{data.source} has one record, and half of the records are kept apart to judge by",
            hint="give more records, or name others to judge by: --holdout FILE",
        )
    random.Random(seed).shuffle(numbers)
    middle = (len(numbers) + 1) // 2
    return _chosen(data, numbers[:middle]), _chosen(data, numbers[middle:])


def shorten(data: DataSet, seed: int, parameters: int) -> DataSet:
    """As many records, drawn by a seed, as are enough for a model of that size: 8,192 to 262,144 tokens."""
    most = min(max(_WORK / max(parameters, 1), _FEW_TOKENS), _MANY_TOKENS)
    tokens: dict[int, int] = {}
    for owner, example in zip(data.owners, data.examples, strict=True):
        tokens[owner] = tokens.get(owner, 0) + len(example.input_ids)
    numbers = sorted(tokens)
    random.Random(seed).shuffle(numbers)
    kept, total = list[int](), 0
    for number in numbers:
        total += tokens[number]
        if kept and total > most:
            break
        kept.append(number)
    return data if len(kept) == len(numbers) else _chosen(data, kept)


def _chosen(data: DataSet, numbers: Sequence[int]) -> DataSet:
    wanted = set(numbers)
    places = [place for place, owner in enumerate(data.owners) if owner in wanted]
    return DataSet(data.source, [data.examples[place] for place in places], [data.owners[place] for place in places])


class _Learned:
    """The weights as a bounded function of a parameter: bound · tanh(u / bound), u = centre + scale @ parameter."""

    def __init__(self, start: Sequence[float]) -> None:
        begin = torch.tensor(start, dtype=torch.float64)
        self._bound = (2 * begin.abs()).clamp_min(_BOUND)
        self._centre = self._bound * torch.atanh(begin / self._bound)
        self._scale = torch.eye(len(start), dtype=torch.float64)
        self.parameter = nn.Parameter(torch.zeros_like(begin))

    def __call__(self) -> Tensor:
        return self._bound * torch.tanh(self._inner() / self._bound)

    def _inner(self) -> Tensor:
        return self._centre + self._scale @ self.parameter

    def whiten(self, gradients: Tensor) -> None:
        """Stay where it is, and measure from here in units in which the information of some gradients is the identity.

        Args:
            gradients: of log-likelihoods by the parameter, (n, groups), such that their products add up to the
                information of a token. A small ridge stands for what they do not tell.
        """
        with torch.no_grad():
            information = gradients.T @ gradients
            ridge = float(information.diagonal().mean()) * _RIDGE or 1.0
            root = torch.linalg.cholesky(information + ridge * torch.eye(len(information), dtype=torch.float64))
            self._centre = self._inner()
            self._scale = self._scale @ torch.linalg.inv(root).T
            self.parameter.zero_()


@dataclass(frozen=True)
class Fitted:
    """Weights by group, and how many steps it took to find them."""

    weights: dict[Group, float]
    steps: int


def fit_weights(
    stacked: StackedModel,
    weighted: WeightedFactors,
    sets: Sequence[DataSet],
    steps: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Fitted:
    """Weights that make the mean of the data sets' losses smallest; nothing else learns.

    Args:
        steps: of L-BFGS at most, each over all records; it ends earlier where the loss is as small as it gets.
        progress: is called with the number of the step after each look at the data.

    Raises:
        Failed: a loss is no number.
    """
    stacked.restore()
    stacked.model.eval()
    learned, taken, looks = _Learned(weighted.start()), 0, 0

    def told(step: int) -> None:
        progress(taken + step)

    scoring = Scoring(stacked, sets)
    with (
        scoring.sharing() as sharing,
        attached(stacked.model, weighted, learned),
        scoring.computing() as at_once,
        torch.enable_grad(),
    ):
        computing = _Computing(stacked.model, stacked.device, learned.parameter, sharing, at_once)
        while taken < steps and looks < _LOOKS * steps:
            if taken:  # far from the best, what the information tells of the way there misleads
                learned.whiten(_gradients(computing, sets))
            most, left = min(_ROUND, steps - taken), _LOOKS * steps - looks
            made, looked = _descend(computing, sets, (most, left), told)
            taken, looks = taken + made, looks + looked
            if made < most and looked < left:
                break  # the loss is as small as it gets
    found = [round(value, _DIGITS) + 0.0 for value in learned().tolist()]
    return Fitted(dict(zip(weighted.groups, found, strict=True)), taken)


@dataclass(frozen=True)
class _Computing:
    """Losses of examples with their gradients of the weights, of rows of which several may be computed ``at_once``."""

    model: nn.Module
    device: torch.device
    parameter: nn.Parameter
    sharing: bool
    at_once: AtOnce | None

    def rows(self, examples: Sequence[Example], *, sharing: bool) -> Iterator[tuple[list[int], tuple[float, Tensor]]]:
        """Rows by the numbers of their examples, with their summed loss (nats) and its gradient (groups,)."""

        def compute(row: Sequence[Example]) -> tuple[float, Tensor]:
            batch = {key: value.to(self.device) for key, value in collate(row).items()}
            loss = supervised_token_losses(self.model, batch).losses.sum()
            # All zero where no member stands on the model's path.
            (gradient,) = torch.autograd.grad(loss, [self.parameter], allow_unused=True, materialize_grads=True)
            return float(loss.detach()), gradient

        return compute_rows(compute, examples, rows_of(examples, sharing=sharing), self.at_once)

    def mean(self, sets: Sequence[DataSet]) -> float:
        """The mean of the data sets' losses; its gradient becomes the parameter's."""
        total, gradients = 0.0, torch.zeros_like(self.parameter)
        for data in sets:
            count = supervised_count(data.examples) * len(sets)
            for _, (loss, gradient) in self.rows(data.examples, sharing=self.sharing):
                total += loss / count
                gradients += gradient / count
        self.parameter.grad = gradients
        return total


def _descend(
    computing: _Computing, sets: Sequence[DataSet], most: tuple[int, int], progress: Callable[[int], None]
) -> tuple[int, int]:
    """At ``most`` so many steps of L-BFGS and looks at the data; returns how many they were: fewer of both where the
    loss is as small as it gets."""
    parameter, (steps, looks) = computing.parameter, most
    optimizer = torch.optim.LBFGS(
        [parameter], max_iter=steps, max_eval=looks, line_search_fn="strong_wolfe",
        tolerance_grad=_FLAT, tolerance_change=_SAME,
    )  # fmt: skip

    def closure() -> Tensor:
        loss = computing.mean(sets)
        if not math.isfinite(loss):
            raise Failed("the loss is not a finite number", hint="begin with smaller weights")
        progress(int(optimizer.state[parameter].get("n_iter", 0)))
        return torch.tensor(loss, dtype=torch.float64)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    state = optimizer.state[parameter]
    return int(state["n_iter"]), int(state["func_evals"])


def _gradients(computing: _Computing, sets: Sequence[DataSet]) -> Tensor:
    """How the gradient of each example's loss differs from what all tokens have in common, (n, groups).

    The products of these add up to the information of a token. Far from the best weights the common part is large and
    says nothing of how the loss bends.
    """
    found: list[Tensor] = []
    for data in sets:
        sizes = torch.tensor([example.supervised for example in data.examples], dtype=torch.float64)
        sums = torch.zeros(len(sizes), len(computing.parameter), dtype=torch.float64)
        for (number,), (_, gradient) in computing.rows(data.examples, sharing=False):
            sums[number] = gradient
        common = sums.sum(0) / sizes.sum()
        found.append((sums - sizes[:, None] * common) / (sizes.sum() * len(sets)).sqrt())
    return torch.nan_to_num(torch.cat(found), nan=0.0, posinf=0.0, neginf=0.0)  # such a loss is refused when it is seen


def member_weights(weighted: WeightedFactors, weights: Mapping[Group, float]) -> list[dict[str, Any]]:
    """What the entry of each member has to say for some weights: ``weight``, ``layer_weights`` or neither."""
    made: list[dict[str, Any]] = [{} for _ in weighted.plan.members]
    for (member, name), value in weights.items():
        if name:
            made[member].setdefault("layer_weights", {})[name] = value
        else:
            made[member] = {"weight": value, "layer_weights": {}}
    return made
