"""stackctl distil"""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from stackctl.cli.common import TRAIN, Context, What, command
from stackctl.cli.train import job_options, prepare, run_switches
from stackctl.cli.train_one import dry_run_result, trained_result, with_next
from stackctl.registry.resolve import current_stack
from stackctl.render.output import Result

_EXAMPLES = """\
stackctl distil style+instruct --rank 16 --name storyteller --data chat.jsonl --eval-data heldout.jsonl
stackctl distil base --system pirate.txt --name pirate --data chat.jsonl"""
_NOT_ASKED = (
    "on", "from", "rebase", "orthogonal", "train_tokens", "teacher", "objective", "beta", "label_smoothing",
    "sft_weight", "frozen",
)  # fmt: skip
"""Options of ``train`` that say nothing here."""


def register(app: typer.Typer) -> None:
    def distil(context: Context, what: str | None, name: str, **flags: Any) -> Result:
        """Train one new adapter on the bare base that says what a stack says, or what it says to a system prompt.

        It begins at the best pair of its rank for the stack, and learns the stack's probabilities on your records.
        """
        resume, dry_run = flags.pop("resume"), flags.pop("dry_run")
        given = {key.rstrip("_"): value for key, value in flags.items() if value is not None}
        teacher = what or current_stack(context.registry)
        prepared = prepare(context, name, None, {**given, "objective": "distil", "teacher": teacher})
        if dry_run:
            return dry_run_result(context, prepared)
        return with_next(trained_result(context, prepared, resume=resume), prepared)

    options = _options()
    distil.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    distil.__annotations__ = {p.name: p.annotation for p in options}
    command(app, "distil", example=_EXAMPLES, panel=TRAIN)(distil)


def _options() -> list[inspect.Parameter]:
    """Its own parameters, and the options of ``train`` that mean something here."""
    called = typer.Option(help="What the new adapter is called.", metavar="NAME", show_default=False)
    own: dict[str, tuple[Any, Any]] = {
        "context": (Context, inspect.Parameter.empty),
        "what": (What, None),
        "name": (Annotated[str, called], inspect.Parameter.empty),
        **job_options(without=_NOT_ASKED),
        **run_switches("resume", "dry_run"),
    }
    kind = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(
            key,
            kind if key != "context" else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=default,
            annotation=type_,
        )
        for key, (type_, default) in own.items()
    ]
