"""stackctl eval"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from stackctl.cli.common import PATH, BaseOption, Context, command, complete_what
from stackctl.cli.prompting import DEVICE, DTYPE, check_choices
from stackctl.errors import Failed, Usage
from stackctl.output import Result
from stackctl.plan import StackPlan
from stackctl.registry import ResolvedStack, resolve_all


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
        max_length: Annotated[int, typer.Option(min=2, help="Longest record in tokens; what is longer is cut.")] = 1024,
        base: BaseOption = None,
        dtype: DTYPE = "auto",
        device: DEVICE = "auto",
    ) -> Result:
        """Loss and perplexity on the supervised tokens of some records, a row for each stack."""
        check_choices(dtype, device)
        if not data:
            raise Usage("no data to evaluate on", hint="stackctl eval base style --data heldout.jsonl")
        expressions = what or [context.registry.current()]
        stacks = resolve_all(context.registry, expressions, base)
        results = evaluate_stacks(context, stacks, data, max_length, dtype, device)
        notes = tuple(note for stack, _ in stacks for note in stack.notes)
        losses = "\n".join(str(row["loss"]) for row in results)
        return Result({"results": results}, losses, lambda: _screen(results, several=len(data) > 1), notes=notes)


def _screen(results: list[dict[str, Any]], *, several: bool) -> Any:
    from stackctl.tables import table

    columns = ["stack", *(["data"] if several else []), "loss", "perplexity", "tokens", "records"]
    rows = [
        [
            row["stack"],
            *([row["data"]] if several else []),
            f"{row['loss']:.4f}",
            f"{row['perplexity']:.3f}" if row["perplexity"] is not None else "inf",
            f"{row['tokens']:,}",
            row["records"],
        ]
        for row in results
    ]
    return table(columns, rows)


def evaluate_stacks(
    context: Context,
    stacks: list[tuple[ResolvedStack, StackPlan]],
    data: Sequence[str],
    max_length: int = 1024,
    dtype: str = "auto",
    device: str = "auto",
) -> list[dict[str, Any]]:
    """A row for each stack and data set: loss (nats), perplexity, supervised tokens and records."""
    from stackctl.engine.data import encode, ensure_chat_template
    from stackctl.engine.evaluation import score_examples
    from stackctl.engine.models import load_base
    from stackctl.engine.records import read_records

    sets = [read_records(source) for source in data]
    registry, output = context.registry, context.output
    for stack, _ in stacks:
        registry.check_digests(stack.members)
    stacked = load_base(stacks[0][0].base, registry, dtype=dtype, device=device, say=output.status)
    ensure_chat_template(stacked.tokenizer)
    length = min(max_length, stacked.base.context_length or max_length)
    encoded = [encode(records, stacked.tokenizer, max_length=length) for records in sets]
    for source, records, found in zip(data, sets, encoded, strict=True):
        for note in found.notes:
            output.note(note)
        if found.truncated:
            output.note(f"{found.truncated} of {records.count} records of {source} were cut to {length} tokens")
    results = []
    with output.progress() as progress:
        task = progress.add_task("evaluating", total=len(stacks) * sum(len(found.examples) for found in encoded))
        for stack, plan in stacks:
            stacked.use(plan)
            for source, found in zip(data, encoded, strict=True):
                score = score_examples(stacked.model, found.examples, lambda count: progress.advance(task, count))
                if not math.isfinite(score.loss):
                    raise Failed(
                        f"the loss of {stack.text} on {source} is not a finite number", hint="use smaller weights"
                    )
                results.append(
                    {
                        "stack": stack.text,
                        "data": source,
                        "loss": score.loss,
                        "perplexity": score.perplexity if math.isfinite(score.perplexity) else None,
                        "tokens": score.tokens,
                        "records": score.records,
                    }
                )
    return results
