"""stackctl eval"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.common import PATH, BaseOption, Context, command, complete_what
from stackctl.cli.prompting import DEVICE, DTYPE
from stackctl.errors import Usage
from stackctl.output import Result
from stackctl.plan import StackPlan
from stackctl.registry import ResolvedStack, resolve_all
from stackctl.scores import comparison_json, render_scores, score_json

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
        data: Annotated[
            list[str] | None,
            typer.Option(
                help="Records as for training: .jsonl, .json, .parquet, .txt, a Hub data set; may be repeated.",
                metavar="FILE",
            ),
        ] = None,
        against: Annotated[
            str | None,
            typer.Option(
                help="Test every stack against this one on the same records: is the difference more than noise?",
                autocompletion=complete_what,
                metavar="WHAT",
            ),
        ] = None,
        max_length: Annotated[int, typer.Option(min=2, help="Longest record in tokens; what is longer is cut.")] = 1024,
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
        rows = results_json(names, data, scores)
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
    from stackctl.engine.evaluation import score_stack, tokenise_for
    from stackctl.engine.models import load_base
    from stackctl.engine.records import read_records

    records = [read_records(source) for source in data]
    for stack, _ in stacks:
        context.registry.check_digests(stack.members)
    stacked = load_base(stacks[0][0].base, context.registry, dtype=dtype, device=device, say=context.output.status)
    sets = [
        tokenise_for(stacked, found, source, max_length, context.output.note)
        for source, found in zip(data, records, strict=True)
    ]
    scores = []
    with context.output.progress() as progress:
        task = progress.add_task("evaluating", total=len(stacks) * sum(len(found.examples) for found in sets))
        for stack, plan in stacks:
            stacked.use(plan)
            scores.append(score_stack(stacked, stack.text, sets, lambda count: progress.advance(task, count)))
    return scores


def results_json(names: Sequence[str], data: Sequence[str], scores: Sequence[Sequence[Score]]) -> list[dict[str, Any]]:
    """A row for stack i on data set j out of ``scores[i][j]``, stack by stack."""
    return [
        score_json(name, source, score)
        for name, found in zip(names, scores, strict=True)
        for source, score in zip(data, found, strict=True)
    ]


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
