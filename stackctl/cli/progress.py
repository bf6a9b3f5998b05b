"""Progress: a live bar on a terminal; of training, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from stackctl.jobs import ranks
from stackctl.render.output import Output

_PATIENCE, _BETWEEN_LINES = 1.0, 10.0
"""Seconds before it is shown how far something is, and between two lines where no bar can be drawn."""
_LINES = 10
"""How many lines a run prints where no bar can be drawn."""


@contextlib.contextmanager
def counting_answers(output: Output, total: int, *, hidden: bool = False) -> Iterator[Callable[[], None]]:
    """A function to call after every one of ``total`` answers; ``hidden`` where they are seen on the terminal."""
    if hidden or not output.shows_progress:
        yield lambda: None
        return
    with output.progress() as progress:
        task = progress.add_task("answering", total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def training_progress(output: Output, name: str) -> Iterator[Callable[[int, int, Any], None]]:
    """A function to call after every optimizer step with (step, steps, counters)."""
    if ranks.rank() > 0:
        yield lambda step, steps, counters: None
        return
    if linked := ranks.link():
        yield lambda step, steps, counters: linked.send("progress", step=step, steps=steps, counters=_news(counters))
        return
    if not output.shows_progress:
        yield lambda step, steps, counters: _line(output, name, step, steps, counters)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TextColumn("{task.fields[seen]}"),
        TextColumn("{task.fields[speed]:,.0f} tokens/s"),
        TimeRemainingColumn(),
    )
    with contextlib.ExitStack() as stack:
        state: dict[str, Any] = {}

        def update(step: int, steps: int, counters: Any) -> None:
            fields = {"loss": counters.curve[-1]["loss"], "seen": _seen(counters), "speed": counters.tokens_per_second}
            if not state:  # begun at the first step, so that notes before it do not tear the bar
                progress = stack.enter_context(output.progress(*columns, stays=True))
                state.update(bar=progress, task=progress.add_task(f"training {name}", total=steps, **fields))
            state["bar"].update(state["task"], completed=step, total=steps, **fields)

        yield update


def _news(counters: Any) -> dict[str, Any]:
    """What a bar shows of the counters."""
    shown = ("tokens", "supervised_tokens", "tokens_per_second")
    return {name: getattr(counters, name) for name in shown} | {"curve": counters.curve[-1:]}


def _seen(counters: Any) -> str:
    """Of answers how they are ranked in this step; of other records how many tokens were learned from."""
    step = counters.curve[-1]
    if "margin" in step:
        return f"ranked rightly {step['accuracy']:.0%}, margin {step['margin']:.3f}"
    return f"{counters.supervised_tokens:,} supervised tokens"


def _line(output: Output, name: str, step: int, steps: int, counters: Any) -> None:
    if step == steps or step == 1 or step % max(1, steps // _LINES) == 0:
        output.status(
            f"training {name}: step {step}/{steps}, loss {counters.curve[-1]['loss']:.3f}, "
            f"{_seen(counters)}, {counters.tokens_per_second:,.0f} tokens/s"
        )


@contextlib.contextmanager
def share_progress(output: Output, what: str = "reading") -> Iterator[Callable[[float], None]]:
    """A function to call with the share (0 to 1) of something that is done; what is done at once shows nothing."""
    with contextlib.ExitStack() as stack:
        state: dict[str, Any] = {"next": time.monotonic() + _PATIENCE}

        def update(share: float) -> None:
            if "bar" in state:
                state["bar"].update(state["task"], completed=share)
                if share >= 1:  # gone before anything else is said
                    stack.close()
                    del state["bar"]
            elif share < 1 and time.monotonic() > state["next"]:
                if output.shows_progress:
                    progress = stack.enter_context(output.progress())
                    state.update(bar=progress, task=progress.add_task(what, total=1.0))
                else:
                    output.status(f"{what}: {share:.0%}")
                    state["next"] = time.monotonic() + _BETWEEN_LINES

        yield update
