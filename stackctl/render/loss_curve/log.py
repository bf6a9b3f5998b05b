"""``training_log.jsonl``: a line for each step with its ``loss``, and one for each look with its ``eval_loss``."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stackctl.core.errors import Usage
from stackctl.storage.files import read_bounded

LOG = "training_log.jsonl"
"""The file beside an adapter's weights."""

_LARGEST = 1e15
"""Steps and losses above it are none, and could not be drawn."""

Point = tuple[float, float]
"""A step and its loss (nats)."""


@dataclass(frozen=True)
class Curve:
    """The losses of a run: of each step's own records, and on held-out ones."""

    training: tuple[Point, ...] = ()
    held_out: tuple[Point, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.training or self.held_out)


def parse_curve(text: str) -> Curve:
    """The curve in a log; lines without a step and a loss are passed over."""
    found: dict[str, list[Point]] = {"loss": [], "eval_loss": []}
    for line in text.splitlines():
        try:
            record = json.loads(line)
            key = next(key for key in found if key in record)
            step, loss = float(record["step"]), float(record[key])
        except (ValueError, KeyError, TypeError, StopIteration, RecursionError, OverflowError):
            continue
        if 0 <= step <= _LARGEST and abs(loss) <= _LARGEST:
            found[key].append((step, loss))
    return Curve(tuple(found["loss"]), tuple(found["eval_loss"]))


def read_curve(folder: Path) -> Curve:
    """The curve beside a checkpoint; empty where there is none."""
    path = folder / LOG
    try:
        return parse_curve(read_bounded(path).decode(errors="replace")) if path.is_file() else Curve()
    except (OSError, Usage):
        return Curve()


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: the means of equal pieces."""
    if len(points) <= most:
        return list(points)
    bounds = [round(index * len(points) / most) for index in range(most + 1)]
    pieces = [points[start:end] for start, end in itertools.pairwise(bounds)]
    return [(sum(s for s, _ in p) / len(p), sum(v for _, v in p) / len(p)) for p in pieces]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers between two."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(step * index, 10) for index in range(first, math.floor(high / step + 1e-9) + 1)]
