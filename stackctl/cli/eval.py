"""stackctl eval"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.common import PATH, BaseOption, Context, command, complete_what
from stackctl.cli.loading import DATA, MAX_LENGTH, load_common_base, read_data, tokenise_data
from stackctl.cli.prompting import DEVICE, DTYPE
from stackctl.errors import Usage
from stackctl.output import Result
from stackctl.plan import StackPlan
from stackctl.registry import ResolvedStack, resolve_all
from stackctl.scores import comparison_json, render_scores, scores_json

if TYPE_CHECKING:
    from stackctl.engine.evaluation import Score


def register(app: typer.Typer) -> None:
    @command(app, "eval", example="stackctl eval base style style+instruct --data heldout.jsonl", panel=PATH)
    def evaluate(
        context: Context,
        what: Annotated[
            list[str] | None,
            typer.Argument(
                metavar="[WHAT]...",
                help="Expressions; the current stack when left out.",
                autocompletion=complete_what,
                show_default=False,
            ),
        ] = None,
        data: DATA = None,
        against: Annotated[
            str | None,
            typer.Option(
                help="Test every stack against this one on the same records: is the difference more than noise?",
                autocompletion=complete_what,
                metavar="WHAT",
            ),
        ] = None,
        max_length: MAX_LENGTH = 1024,
        base: BaseOption = None,
        dtype: DTYPE = "auto",
        device: DEVICE = "auto",
    ) -> Result:
        """Loss, perplexity and accuracy on the supervised tokens of some records, a row for each stack."""
        if not data:
            raise Usage("no data to evaluate on", hint="stackctl eval base style --data heldout.jsonl")
        asked = what or [context.registry.current()]
        extra = [against] if against and against not in asked else []
        stacks = resolve_all(context.registry, [*asked, *extra], base)
        scores = evaluate_stacks(context, stacks, data, max_length, dtype, device)
        names = [stack.text for stack, _ in stacks]
        rows = scores_json(names, data, scores)
        comparisons: list[dict[str, Any]] = []
        if against:
            comparisons = comparisons_json(names, data, scores, [*asked, *extra].index(against), tested=len(asked))
        notes = tuple(note for stack, _ in stacks for note in stack.notes)
        losses = "\n".join(str(row["loss"]) for row in rows)
        document = {"results": rows, "comparisons": comparisons}
        return Result(document, losses, lambda: render_scores(rows, comparisons), notes=notes)


def evaluate_stacks(
    context: Context,
    stacks: Sequence[tuple[ResolvedStack, StackPlan]],
    data: Sequence[str],
    max_length: int = 1024,
    dtype: str = "auto",
    device: str = "auto",
) -> list[list[Score]]:
    """The score of each stack on each data set; the base is loaded once."""
    from stackctl.engine.evaluation import score_stack

    records = read_data(data)
    stacked = load_common_base(context, stacks, dtype, device)
    sets = tokenise_data(context, stacked, data, records, max_length)
    scores = []
    with context.output.progress() as progress:
        task = progress.add_task("evaluating", total=len(stacks) * sum(len(found.examples) for found in sets))
        for stack, plan in stacks:
            stacked.use(plan)
            scores.append(score_stack(stacked, stack.text, sets, lambda count: progress.advance(task, count)))
    return scores


def comparisons_json(
    names: Sequence[str], data: Sequence[str], scores: Sequence[Sequence[Score]], against: int, *, tested: int
) -> list[dict[str, Any]]:
    """Paired tests of the first ``tested`` stacks against one of all, in the order of the rows."""
    from stackctl.engine.significance import paired_test

    return [
        comparison_json(name, names[against], source, paired_test(mine.records, other.records))
        for name, found in zip(names[:tested], scores, strict=False)
        for source, mine, other in zip(data, found, scores[against], strict=True)
    ]
