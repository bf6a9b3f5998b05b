"""How a step of training is cut into micro-batches, and whether activations are kept: memory and time, not results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

AUTO = "auto"
CUT = "cut"
"""Where a run that is not finished has written down how its steps are cut."""


@dataclass(frozen=True)
class StepCut:
    """A step of each process: ``count`` micro-batches of ``records`` (or pairs, or packed sequences).

    ``checkpointing``: activations are computed again for the backward pass instead of kept. ``tokens``: a micro-batch
    goes forward and back in parts of at most so many, between records; ``at_once``: so many parts at a time.
    ``as_one``: the parts are those of all micro-batches of the step, short records of which go together.
    """

    records: int
    count: int = 1
    checkpointing: bool = False
    tokens: int | None = None
    at_once: int = 1
    as_one: bool = False

    @property
    def rows(self) -> int:
        """Records (or pairs, or packed sequences) that Trainer hands over at a time."""
        return self.records * self.count if self.as_one else self.records

    @property
    def accumulated(self) -> int:
        """How often it does in a step."""
        return 1 if self.as_one else self.count

    @property
    def beside(self) -> int:
        """Tokens of a part that is computed beside another. A longer record has all threads for itself."""
        assert self.tokens, "nothing is computed at once that is not parted"
        return self.tokens * 2 // 3

    def __str__(self) -> str:
        cut = (
            f"{self.count} micro-batches of {self.records}" if self.count > 1 else f"one micro-batch of {self.records}"
        )
        return cut + (", activations computed again" if self.checkpointing else "")


def read_cut(told: Any) -> StepCut | None:
    """A cut as a run wrote it down, if it is one."""
    try:
        return msgspec.convert(told, StepCut)
    except msgspec.ValidationError:
        return None


def possible_cuts(asked: StepCut, *, smaller: bool = False, checkpointing: bool | None = None) -> list[StepCut]:
    """The ways to compute a step that is cut as ``asked``, the fastest first.

    ``smaller`` admits every other cut of the same step into equal micro-batches. ``checkpointing`` None admits both:
    activations are kept wherever that fits, for computing them again takes a third of the time more. Parts are computed
    at once where they are kept, and one after another in less memory. Parts of the whole step are admitted, not
    demanded.
    """
    step = asked.records * asked.count
    sizes = [size for size in range(step, 0, -1) if step % size == 0] if smaller else [asked.records]
    kinds = [(False, parts) for parts in dict.fromkeys((asked.at_once, 1))] if not checkpointing else []
    kinds += [(True, 1)] if checkpointing is not False else []
    whole = (True, False) if asked.as_one and asked.count > 1 and not smaller else (False,)
    return [
        StepCut(size, step // size, kept, asked.tokens, parts, one)
        for kept, parts in kinds
        for size in sizes
        for one in whole
    ]


def first_that_fits(cuts: Sequence[StepCut], fits: Callable[[StepCut], bool], *, smaller: bool = False) -> StepCut:
    """The first cut that fits; where none does the last one if ``smaller``, which needs least, else what was asked."""
    asked = next(cut for cut in cuts if not cut.as_one)
    return next((cut for cut in cuts if fits(cut)), cuts[-1] if smaller else asked)
