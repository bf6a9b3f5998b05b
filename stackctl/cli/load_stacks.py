"""What eval and compare have in common: several stacks on one base that is loaded once, and data to measure them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, cast

import typer

from stackctl.cli.command import Context
from stackctl.cli.engines import Computing
from stackctl.cli.progress import share_progress
from stackctl.core.errors import attempt_each
from stackctl.core.template_arguments import Arguments
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import PlannedStack

if TYPE_CHECKING:
    from stackctl.engine.evaluation.scoring import DataSet, Score
    from stackctl.engine.generation import AnswerEngine
    from stackctl.engine.generation.reader import Reader
    from stackctl.engine.models import StackedModel
    from stackctl.engine.records.read import RecordStream

DATA = Annotated[
    list[str] | None,
    typer.Option(
        help="Records as for training: .jsonl, .json, .parquet, .csv, .txt, a folder of texts, a Hub data set; may be "
        "repeated.",
        metavar="FILE",
    ),
]


@dataclass(frozen=True)
class RecordOptions:
    """What stacks are measured on; each field is an option."""

    data: DATA = None
    max_length: Annotated[int, typer.Option(min=2, help="Longest record in tokens; what is longer is cut.")] = 1024


def read_data(sources: Sequence[str]) -> list[RecordStream]:
    """The records of some data sets.

    Raises:
        StackctlError: everything that is wrong with any of them, at once.
    """
    from stackctl.engine.records.read import read_records

    return attempt_each(read_records, sources)


def load_common_base(context: Context, stacks: Sequence[PlannedStack], dtype: str, device: str) -> StackedModel:
    """The base that some stacks stand on, by transformers; see :func:`load_to_answer`."""
    return cast("StackedModel", load_to_answer(context, stacks, Computing("transformers", dtype, device)))


def load_to_answer(context: Context, stacks: Sequence[PlannedStack], computing: Computing) -> AnswerEngine:
    """The base that some stacks stand on, once the bytes of all their members are known to be what was registered.

    Raises:
        VerificationFailed, NotFound, Incompatible: they are not, or the base cannot be loaded.
    """
    from stackctl.engine.data.chat_template import adopt_chat_template

    for stack, _ in stacks:
        check_digests(context.registry, stack.members)
    base = stacks[0][0].base
    stacked = computing.load(base, context.registry, context.output.status)
    if note := adopt_chat_template(stacked.tokenizer, base.name, [plan for _, plan in stacks]):
        context.output.note(note)
    return stacked


@dataclass(frozen=True)
class MeasuredData:
    """What stacks are measured on: data sets by name, their records, and how they become tokens.

    With ``answers`` both answers of a pair are read, else the chosen one.
    """

    sources: Sequence[str] = ()
    records: Sequence[RecordStream] = ()
    max_length: int = 1024
    template: Arguments = field(default_factory=dict)
    answers: bool = False


def tokenise_data(context: Context, reader: Reader, data: MeasuredData) -> list[DataSet]:
    """Data sets in the base's tokens; notes say what was cut or left out."""
    from stackctl.engine.data.examples import EncodeOptions
    from stackctl.engine.evaluation.scoring import tokenise_for

    options = EncodeOptions(data.max_length, answers=data.answers, template=data.template)
    return [
        tokenise_for(reader, found, source, options, context.output.note)
        for source, found in zip(data.sources, data.records, strict=True)
    ]


def read_sets(
    context: Context, planned: PlannedStack, sources: Sequence[str], max_length: int, template: Arguments | None = None
) -> list[DataSet]:
    """Data sets in the tokens of a stack's base, before that is loaded.

    Raises:
        StackctlError: everything that is wrong with any of them, at once.
    """
    from stackctl.engine.quick_imports import import_transformers

    records = read_data(sources)
    import_transformers()
    from stackctl.engine.base.tokenizer import load_tokenizer
    from stackctl.engine.data.chat_template import adopt_chat_template
    from stackctl.engine.generation.reader import PlainReader

    tokenizer = load_tokenizer(context.base_folder(planned.stack.base))
    adopt_chat_template(tokenizer, planned.stack.base.name, [planned.plan])
    reader = PlainReader(planned.stack.base, tokenizer)

    def tokenised(found: tuple[str, RecordStream]) -> DataSet:
        return tokenise_data(context, reader, MeasuredData([found[0]], [found[1]], max_length, template or {}))[0]

    return attempt_each(tokenised, zip(sources, records, strict=True))


def score_stacks(
    context: Context,
    stacked: StackedModel,
    stacks: Sequence[tuple[str, StackPlan]],
    sets: Sequence[DataSet],
    doing: str = "evaluating",
    *,
    finite: bool = True,
) -> list[list[Score]]:
    """What each of some stacks, by name, makes of each data set; each is folded in once.

    Raises:
        Failed: a loss is no number, unless they need not be ``finite``.
    """
    from stackctl.engine.evaluation.scoring import Scoring

    scoring = Scoring(stacked, sets)
    scores = []
    done, total = 0, len(stacks) * sum(len(found.examples) for found in sets)
    with share_progress(context.output, doing) as progress:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done / total)

        for name, plan in stacks:
            stacked.use(plan)
            scores.append(scoring.score(name, advance) if finite else scoring.measure(advance))
    return scores
