"""stackctl eval"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.command import TRAIN, Context, command
from stackctl.cli.engines import BaseOptions
from stackctl.cli.eval_table import comparison_json, render_scores, render_tasks, scores_json
from stackctl.cli.load_stacks import (
    MeasuredData,
    RecordOptions,
    load_common_base,
    read_data,
    score_stacks,
    tokenise_data,
)
from stackctl.cli.shared_options import TemplateOptions, complete_what, expression
from stackctl.core.errors import Usage
from stackctl.core.expressions import BASE
from stackctl.machine.optional_packages import check_installed
from stackctl.registry.planning import PlannedStack, plan_expressions
from stackctl.registry.resolve import current_stack
from stackctl.render.output import Result

if TYPE_CHECKING:
    from rich.console import RenderableType

    from stackctl.engine.evaluation.harness import Harness, TaskScore
    from stackctl.engine.evaluation.scoring import Score
    from stackctl.engine.models import StackedModel

_of_tasks = partial(typer.Option, rich_help_panel="Tasks of lm-evaluation-harness")
_BATCH = 8
_EXAMPLES = """\
stackctl eval style+instruct --against style --data heldout.jsonl
stackctl eval base style+instruct --task arc_easy --limit 200
stackctl eval base style style+instruct --data heldout.jsonl"""


@dataclass(frozen=True)
class _Tasks:
    """Benchmark tasks, and how they are put; each field is an option, with its help."""

    task: Annotated[
        list[str] | None,
        _of_tasks(
            help="A task of lm-evaluation-harness, by its name or its YAML file; may be repeated. Needs the extra "
            "[eval].",
            metavar="TASK",
        ),
    ] = None
    limit: Annotated[int | None, _of_tasks(min=1, help="Only the first N records of each task.")] = None
    num_fewshot: Annotated[
        int | None, _of_tasks(min=0, help="Solved examples (shots) before each record; a task that sets 0 keeps 0.")
    ] = None
    batch_size: Annotated[int | None, _of_tasks(min=1, help="Requests in a batch; 8 if left out.")] = None

    def check(self) -> None:
        """Raises ``Usage`` where it is said how tasks are put, and none is."""
        options = {"--limit": self.limit, "--num-fewshot": self.num_fewshot, "--batch-size": self.batch_size}
        given = [option for option, value in options.items() if value is not None]
        if given and not self.task:
            raise Usage(
                f"{' and '.join(given)} {'apply' if len(given) > 1 else 'applies'} to --task, and none was given",
                hint="name one: --task arc_easy",
            )

    def open(self) -> Harness | None:
        """The tasks with their data; None where none was asked for."""
        if not self.task:
            return None
        check_installed("lm_eval")
        from stackctl.engine.evaluation.harness import open_tasks

        return open_tasks(
            self.task, limit=self.limit, num_fewshot=self.num_fewshot, batch_size=self.batch_size or _BATCH
        )


@command("eval", example=_EXAMPLES, panel=TRAIN)
def evaluate(
    context: Context,
    what: Annotated[
        list[str] | None, expression(metavar="[WHAT...]", help="Expressions; the current stack when left out.")
    ] = None,
    *,
    held_out: RecordOptions,
    against: Annotated[
        str | None,
        typer.Option(
            help="Paired test of every stack against this one: is the difference more than noise?",
            autocompletion=complete_what,
            metavar="WHAT",
        ),
    ] = None,
    arguments: TemplateOptions,
    tasks: _Tasks,
    loading: BaseOptions,
) -> Result:
    """Measure loss, perplexity and accuracy on supervised tokens, and scores on benchmark tasks.

    For pairs of answers: how many each stack ranks rightly and by how much, compared with --against or the base.
    """
    data, template = held_out.data or [], arguments.template()
    if not data and not tasks.task:
        raise Usage("no data to evaluate on", hint="stackctl eval base style --data heldout.jsonl")
    if against and not data:
        raise Usage(
            "--against compares losses on records, and no --data was given", hint="name some: --data heldout.jsonl"
        )
    tasks.check()
    asked = what or [current_stack(context.registry)]
    extra = [against] if against and against not in asked else []
    stacks = plan_expressions(context.registry, [*asked, *extra], loading.base)
    harness = tasks.open()
    records = read_data(data)
    stacked = load_common_base(context, stacks, loading.dtype, loading.device)
    if harness:
        harness.attach(stacked)
    sets = tokenise_data(context, stacked, MeasuredData(data, records, held_out.max_length, template, answers=True))
    named = [(stack.text, plan) for stack, plan in stacks]
    reference = against or BASE
    if reference not in (names := [*asked, *extra]) and any(found.pairs for found in sets):
        ((stack, plan),) = plan_expressions(context.registry, [BASE], stacks[0].stack.base.name)
        named.append((stack.text, plan))
        names.append(BASE)
    scores = score_stacks(context, stacked, named, sets) if sets else []
    found = _score_tasks(context, stacked, stacks, harness) if harness else []
    compared = scores[names.index(reference)] if reference in names and scores else []
    names = [stack.text for stack, _ in stacks]
    rows = scores_json(names, data, scores[: len(stacks)], (reference, compared)) if data else []
    comparisons: list[dict[str, Any]] = []
    if against:
        comparisons = comparisons_json(names, data, scores, [*asked, *extra].index(against), tested=len(asked))
    notes = tuple(note for stack, _ in stacks for note in stack.notes)
    numbers = [row["loss"] for row in rows] + [score.value for score in found]
    document = {"results": rows, "comparisons": comparisons, "tasks": [asdict(score) for score in found]}
    brief = "\n".join(map(str, numbers))
    return Result(document, brief, lambda: _screen(rows, comparisons, found), notes=notes)


def _screen(
    rows: Sequence[dict[str, Any]], comparisons: Sequence[dict[str, Any]], found: Sequence[TaskScore]
) -> RenderableType:
    from rich.console import Group

    parts = [render_scores(rows, comparisons)] if rows else []
    return Group(*parts, *([render_tasks(found)] if found else []))


def _score_tasks(
    context: Context, stacked: StackedModel, stacks: Sequence[PlannedStack], harness: Harness
) -> list[TaskScore]:
    scores: list[TaskScore] = []
    for stack, plan in stacks:
        context.output.status(f"{stack.text} on {harness.label}")
        stacked.use(plan)
        scores += harness.score(stack.text)
    return scores


def comparisons_json(
    names: Sequence[str], data: Sequence[str], scores: Sequence[Sequence[Score]], against: int, *, tested: int
) -> list[dict[str, Any]]:
    """Paired tests of the first ``tested`` stacks against one of all, in the order of the rows."""
    from stackctl.engine.evaluation.significance import paired_test

    return [
        comparison_json(name, names[against], source, paired_test(mine.records, other.records))
        for name, found in zip(names[:tested], scores, strict=False)
        for source, mine, other in zip(data, found, scores[against], strict=True)
    ]
