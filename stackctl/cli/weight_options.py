"""The options of compose with which weights are found: learned with --fit, tried with --sweep, or both and more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stackctl.cli.fit_weights import FitRequest
from stackctl.cli.sweep_weights import SweepRequest
from stackctl.core.errors import Usage, raise_all
from stackctl.plan.layer_weights import Per

_of_fit = partial(typer.Option, rich_help_panel="Weights learned from data")
_of_sweep = partial(typer.Option, rich_help_panel="Weights tried one by one")
_of_both = partial(typer.Option, rich_help_panel="Data for either")


@dataclass(frozen=True)
class WeightOptions:
    """Each field is an option of compose, with its help; None where it was not given."""

    fit: Annotated[
        list[str] | None,
        _of_fit(
            help="Learn the weights of the members, and nothing else, from these records, as for train; may be "
            "repeated: the mean of the losses counts then. Kept only if better on held-out records.",
            metavar="FILE",
        ),
    ] = None
    per: Annotated[
        Per | None, _of_fit(help="With --fit or --method best: what gets a weight of its own.", show_default="member")
    ] = None
    holdout: Annotated[
        list[str] | None,
        _of_fit(
            help="With --fit or --method best: held-out records; half of the others if left out. May be repeated.",
            metavar="FILE",
        ),
    ] = None
    fit_steps: Annotated[
        int | None, _of_fit(min=1, help="With --fit or --method best: steps of L-BFGS at most.", show_default="30")
    ] = None
    sweep: Annotated[
        list[str] | None,
        _of_sweep(
            help="Losses over a range of one member's weights, both ends in it: 'style=0:1.5:0.25'; given twice, over "
            "a grid. Writes nothing, or with --name the best stack.",
            metavar="RANGE",
        ),
    ] = None
    data: Annotated[
        list[str] | None,
        _of_sweep(
            help="With --sweep or --method best: records as for eval; may be repeated: then the mean of the losses "
            "says which is best.",
            metavar="FILE",
        ),
    ] = None
    to: Annotated[
        Path | None,
        _of_sweep("--output", help="With --sweep: write one self-contained page: sweep.html.", metavar="FILE"),
    ] = None
    max_length: Annotated[
        int | None, _of_both(min=2, help="Longest record in tokens; what is longer is cut.", show_default="1024")
    ] = None
    device: Annotated[
        Literal["auto", "cpu", "cuda", "mps"] | None, _of_both(help="Device to run on.", show_default="auto")
    ] = None

    def request(self, seed: int | None, *, best: bool) -> FitRequest | SweepRequest | None:
        """What is asked for, with ``--method best`` or without; None when the weights are those that are typed.

        Raises:
            Usage: options without what they belong to, or with none of their values; all of it at once.
        """
        raise_all(self._problems(seed, best=best))
        shared: dict[str, Any] = {"max_length": self.max_length or 1024, "device": self.device or "auto"}
        if self.sweep:
            return SweepRequest(self.sweep, self.data or (), self.to, **shared)
        if not self.fit and not best:
            return None
        typed = {"per": self.per, "holdout": self.holdout, "steps": self.fit_steps}
        chosen: dict[str, Any] = {key: value for key, value in typed.items() if value is not None}
        data = self.data if best else self.fit
        return FitRequest(data or (), seed=seed or 0, **chosen, **shared)

    def _problems(self, seed: int | None, *, best: bool) -> Iterator[Usage]:
        of_fit = {"--per": self.per, "--holdout": self.holdout, "--fit-steps": self.fit_steps}
        of_sweep = {"--output": self.to} if best else {"--data": self.data, "--output": self.to}
        of_both = {"--max-length": self.max_length, "--device": self.device}
        name_records = "name records: --fit FILE"
        if best and (given := _given({"--fit": self.fit, "--sweep": self.sweep})):
            yield Usage(f"--method best tries by itself what {given} asks for", hint=f"leave out {given}")
        if best and not self.data:
            yield Usage("--method best judges by losses, and no --data was given", hint="--data FILE")
        if self.fit and self.sweep:
            yield Usage(
                "--fit learns weights and --sweep tries given ones", hint="one of them at a time: leave out one"
            )
        if not self.fit and not best and (given := _given(of_fit)):
            yield Usage(f"{given} applies to --fit, and none was given", hint=name_records)
        if not self.sweep and (given := _given(of_sweep)):
            owner = "--sweep" if self.to else "--sweep or --method best"
            what = f"{given} applies to {owner}, and none was given"
            yield Usage(what, hint="say what to try: --sweep style=0:1.5:0.25")
        if not self.fit and not self.sweep and not best and (given := _given(of_both)):
            yield Usage(f"{given} applies to --fit and --sweep, and none was given", hint=name_records)
        if self.sweep and not self.data:
            yield Usage("--sweep measures losses, and no --data was given", hint="name records: --data FILE")
        if (self.fit or self.sweep or best) and seed is not None and seed < 0:
            yield Usage("--seed must not be negative", hint="--seed 0")


def _given(options: dict[str, Any]) -> str:
    return ", ".join(name for name, value in options.items() if value is not None and value != [])
