"""stackctl distil"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.command import TRAIN, Context, command
from stackctl.cli.shared_options import What
from stackctl.cli.train import DRY_RUN, RESUME, job_options, prepare, typed_options
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

if TYPE_CHECKING:
    JobOptions = Any
else:
    JobOptions = job_options(without=_NOT_ASKED)


@command("distil", example=_EXAMPLES, panel=TRAIN)
def distil(
    context: Context,
    what: What = None,
    *,
    name: Annotated[str, typer.Option(help="What the new adapter is called.", metavar="NAME", show_default=False)],
    job: JobOptions,
    resume: RESUME = False,
    dry_run: DRY_RUN = False,
) -> Result:
    """Distil a stack, or a stack behind a system prompt, into one new adapter on the bare base.

    It begins at the best pair of its rank for the stack (SVD), and learns the stack's token probabilities on your
    records.
    """
    teacher = what or current_stack(context.registry)
    asked = {**typed_options(job), "objective": "distil", "teacher": teacher}
    prepared = prepare(context, name, None, asked)
    if dry_run:
        return dry_run_result(context, prepared)
    return with_next(trained_result(context, prepared, resume=resume), prepared)
