"""stackctl compare"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from stackctl.cli.command import TRAIN, Context, command
from stackctl.cli.comparison import comparison_page, render_comparison, settings_of
from stackctl.cli.engines import check_has_gguf
from stackctl.cli.eval_table import scores_json
from stackctl.cli.load_stacks import MeasuredData, RecordOptions, load_to_answer, read_data, tokenise_data
from stackctl.cli.prompt_options import (
    MAX_NEW,
    GenerateOptions,
    PromptOptions,
    answer_json,
    read_prompts,
    say_what_rounding_costs,
)
from stackctl.cli.shared_options import BaseOption, expression
from stackctl.core.errors import StackctlError, Usage, gathering, raise_all
from stackctl.plan.lint import check_beside_base
from stackctl.registry.planning import PlannedStack, plan_expressions
from stackctl.render import html as pages
from stackctl.render.output import Result

if TYPE_CHECKING:
    from stackctl.engine.evaluation.scoring import DataSet
    from stackctl.engine.generation import Sampling
    from stackctl.engine.models import StackedModel
    from stackctl.engine.records.prompt_files import Prompt

_EXAMPLES = """\
stackctl compare base style --prompts prompts.txt --data heldout.jsonl --output report.html
stackctl compare style style:0.5 -p "Tell me of rain." --temperature 0.8 --seed 1
stackctl compare base style style+instruct -p "Tell me of rain.\""""


@command("compare", example=_EXAMPLES, panel=TRAIN)
def compare(
    context: Context,
    what: Annotated[list[str], expression(metavar="WHAT WHAT...", help="Two or more expressions.")],
    *,
    prompts: PromptOptions,
    held_out: RecordOptions,
    to: Annotated[
        Path | None, typer.Option("--output", help="Write one self-contained page: report.html.", metavar="FILE")
    ] = None,
    max_new_tokens: MAX_NEW = 128,
    answering: GenerateOptions,
    base: BaseOption = None,
) -> Result:
    """Answer the same prompts with several stacks, side by side; the base is loaded once.

    With --data each stack is measured on held-out records as well, as eval does.
    """
    problems: list[StackctlError] = []
    with gathering(problems):
        asked = _asked(read_prompts(prompts))
    with gathering(problems):
        answering.check(context.output, measures=bool(held_out.data))
    with gathering(problems):
        stacks = plan_expressions(context.registry, what, base)
    if answering.computing.is_llama_cpp:
        problems += _not_for_llama_cpp(context, stacks if not problems else [], held_out.data)
    if to is not None:
        with gathering(problems):
            pages.check_page_place(to)
    with gathering(problems):
        records = read_data(held_out.data or ())
    raise_all(problems)
    sampling = answering.sampling(max_new_tokens)
    measured = MeasuredData(held_out.data or (), records, held_out.max_length)
    found = compare_stacks(context, stacks, asked, sampling, measured, answering)
    notes = tuple(note for stack, _ in stacks for note in stack.notes)
    document = {"results": found.answers, "scores": found.scores, "path": str(to.absolute()) if to else None}
    if to is not None:
        settings = settings_of(stacks, sampling, found.precision, measured.sources, held_out.max_length)
        pages.write_page(to, comparison_page(what, found.answers, found.scores, settings))
        said = f"wrote {len(found.answers)} answers side by side to {to}"
        return Result(document, str(to), lambda: render_comparison(what, [], found.scores, said), notes=notes)
    texts = "\n".join(answer["text"] for answer in found.answers)
    return Result(document, texts, lambda: render_comparison(what, found.answers, found.scores), notes=notes)


def _not_for_llama_cpp(context: Context, stacks: Sequence[PlannedStack], data: list[str] | None) -> list[StackctlError]:
    """What llama.cpp cannot do of what was asked."""
    problems: list[StackctlError] = []
    if data:
        problems.append(
            Usage("losses are computed by transformers, not by llama.cpp", hint="leave out --data, or --engine")
        )
    for stack, plan in stacks:
        with gathering(problems):
            check_has_gguf(stack.base, context.registry)
            check_beside_base("gguf", plan)
    return problems


def _asked(prompts: list[Prompt] | None) -> list[Prompt]:
    if prompts is None:
        raise Usage("no prompt was given", hint='stackctl compare base style -p "Tell me of rain."')
    return prompts


@dataclass(frozen=True)
class Compared:
    """Answers prompt by prompt, stacks in the order asked for, scores as of ``eval``, and what it was computed in."""

    answers: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    precision: str


def compare_stacks(
    context: Context,
    stacks: Sequence[PlannedStack],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    measured: MeasuredData | None = None,
    answering: GenerateOptions | None = None,
) -> Compared:
    """The answers of every stack to every prompt and its scores; the base is loaded once, each stack is used once."""
    from stackctl.engine.generation import generate

    measured, answering, output = measured or MeasuredData(), answering or GenerateOptions(), context.output
    stacked = load_to_answer(context, stacks, answering.computing)
    sets: list[DataSet] = []
    scoring = None
    if measured.sources:
        from stackctl.engine.evaluation.scoring import Scoring  # with torch, which answers may do without

        sets = tokenise_data(context, stacked, replace(measured, template=dict(sampling.template)))
        scoring = Scoring(cast("StackedModel", stacked), sets)
    answers: list[list[dict[str, Any]]] = []
    scores = []
    with output.progress() as progress:
        steps = len(prompts) + sum(len(found.examples) for found in sets)
        task = progress.add_task("comparing", total=len(stacks) * steps)
        for stack, plan in stacks:
            stacked.use(plan)
            say_what_rounding_costs(stacked, output, of=stack.text, instead="--dtype float32")
            answers.append([])
            for answer in generate(stacked, prompts, sampling, batch_size=answering.batch_size):
                answers[-1].append(answer_json(stack.text, answer, stacked))
                progress.advance(task)
            scores.append(scoring.score(stack.text, lambda count: progress.advance(task, count)) if scoring else [])
    by_prompt = [answers[column][row] for row in range(len(prompts)) for column in range(len(stacks))]
    rows = scores_json([stack.text for stack, _ in stacks], measured.sources, scores)
    return Compared(by_prompt, rows, stacked.precision)
