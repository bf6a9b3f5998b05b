"""stackctl generate"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackctl.cli.command import TRAIN, Context, command
from stackctl.cli.engines import check_has_gguf
from stackctl.cli.progress import counting_answers
from stackctl.cli.prompt_options import (
    MAX_NEW,
    GenerateOptions,
    PromptOptions,
    answer_json,
    read_prompts,
    say_what_rounding_costs,
)
from stackctl.cli.shared_options import BaseOption, What, of_device
from stackctl.core.errors import Usage
from stackctl.plan.lint import check_beside_base
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import plan_expression
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry
from stackctl.render.output import JSON_SCHEMA, Output, Result
from stackctl.storage import atomic
from stackctl.storage.files import json_line
from stackctl.storage.paths import check_output

if TYPE_CHECKING:
    from stackctl.engine.generation import AnswerEngine, Generated, Sampling
    from stackctl.engine.records.prompt_files import Prompt

_EXAMPLES = """\
stackctl generate storyteller
stackctl generate style:0.5 -p "Tell me of rain." --temperature 0.8 --seed 1
stackctl generate base --prompts prompts.txt --output answers.jsonl
stackctl generate storyteller -p "Tell me about the sea.\""""


@command("generate", example=_EXAMPLES, panel=TRAIN)
def generate(
    context: Context,
    what: What = None,
    *,
    prompts: PromptOptions,
    to: Annotated[
        Path | None,
        typer.Option(
            "--output", help="Write the answers to a file: .jsonl as --json prints them, else text.", metavar="FILE"
        ),
    ] = None,
    max_new_tokens: MAX_NEW = 256,
    answering: GenerateOptions,
    live: Annotated[
        bool, of_device(help="Keep the stack as one live LoRA instead of folding it into the base; slower.")
    ] = False,
    base: BaseOption = None,
) -> Result | None:
    """Generate text with a stack, streamed; without -p, read standard input, or chat on a terminal."""
    registry, output = context.registry, context.output
    stack, plan = plan_expression(registry, what, base=base)
    answering.check(output)
    computing = answering.computing
    if computing.is_llama_cpp:
        _check_llama_cpp(stack, plan, registry, live)
    asked = read_prompts(prompts)
    _check_place(to, output, asked)
    check_digests(registry, stack.members)
    for note in stack.notes:
        output.note(note)
    from stackctl.engine.data.chat_template import choose_chat_template

    stacked = computing.load(stack.base, registry, output.status)
    own_template = stacked.tokenizer.chat_template
    if told := choose_chat_template(stacked.tokenizer, stack.base.name, plan, raw=answering.raw):
        output.note(told)
    stacked.use(plan, live=live)
    say_what_rounding_costs(stacked, output)
    name, sampling = stack.name or stack.text, answering.sampling(max_new_tokens)
    if asked is not None:
        return _answer(stacked, _Questions(name, asked, sampling, answering.batch_size), output, to)
    from stackctl.cli.chat import Chat

    Chat(registry, output, stacked, stack, sampling, own_template, live).run()
    return None


def _check_llama_cpp(stack: ResolvedStack, plan: StackPlan, registry: Registry, live: bool) -> None:
    if live:
        raise Usage("llama.cpp keeps every stack beside the base, never folded", hint="leave out --live")
    check_has_gguf(stack.base, registry)
    check_beside_base("gguf", plan)


def _check_place(to: Path | None, output: Output, asked: list[Prompt] | None) -> None:
    """Where the answers are to go is known to be possible before anything is computed.

    Raises:
        NotFound, Usage: there is no such folder, or a chat was asked for what only answers to prompts have.
    """
    if asked is None and (to or output.json_mode):
        raise Usage(
            f"a chat has no {'--output' if to else '--json'}", hint='give prompts with -p "…", --prompts FILE or a pipe'
        )
    if to is not None:
        check_output(to)


@dataclass(frozen=True)
class _Questions:
    """What a stack is asked, and how it is to answer; ``name`` is the stack's."""

    name: str
    prompts: list[Prompt]
    sampling: Sampling
    batch_size: int | None


def _answer(stacked: AnswerEngine, questions: _Questions, output: Output, to: Path | None) -> Result | None:
    """Every answer on stdout as soon as it is there, or all of them in a file once the last one is."""
    from stackctl.engine.generation import generate

    asked, sampling, name = questions.prompts, questions.sampling, questions.name
    streams = len(asked) == 1 and not output.json_mode and to is None
    written: list[str] = []
    hidden = len(asked) == 1 or (to is None and sys.stdout.isatty())
    with counting_answers(output, len(asked), hidden=hidden) as advance:
        answers = generate(
            stacked, asked, sampling, batch_size=questions.batch_size, on_text=output.speech if streams else None
        )
        for answer in answers:
            document = answer_json(name, answer, stacked)
            if to is not None:
                if to.suffix.lower() == ".jsonl":
                    written.append(json_line({"schema": JSON_SCHEMA, **document}) + "\n")
                else:
                    written.append(_text(answer, titled=len(asked) > 1))
            if output.json_mode:
                output.line_json(document)
            elif to is None:
                output.speech("\n" if streams else _text(answer, titled=len(asked) > 1 and not output.quiet))
            advance()
    if to is None:
        return None
    atomic.write_output(to, "".join(written))
    count = f"{len(asked)} answers" if len(asked) > 1 else "the answer"
    if output.json_mode:
        output.status(f"wrote {count} to {to}")
        return None
    return Result({}, str(to), f"wrote {count} to {to}")


def _text(answer: Generated, *, titled: bool) -> str:
    return f"> {answer.prompt.text}\n{answer.text}\n\n" if titled else f"{answer.text}\n"
