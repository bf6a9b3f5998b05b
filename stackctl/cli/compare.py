"""stackctl compare"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.common import PATH, BaseOption, Context, command, complete_what
from stackctl.cli.prompting import (
    BATCH,
    DEVICE,
    DTYPE,
    MAX_NEW,
    MIN_P,
    PENALTY,
    PROMPT,
    PROMPTS,
    RAW,
    SEED,
    STOP,
    SYSTEM,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    answer_json,
    check_finite,
    check_sampling,
    read_prompts,
)  # fmt: skip
from stackctl.errors import Usage
from stackctl.output import Result
from stackctl.plan import StackPlan
from stackctl.registry import Registry, ResolvedStack, resolve_all

if TYPE_CHECKING:
    from stackctl.engine.generation import Sampling
    from stackctl.engine.records import Prompt


def register(app: typer.Typer) -> None:
    @command(app, "compare", example='stackctl compare base style style+instruct -p "Tell me of rain."', panel=PATH)
    def compare(
        context: Context,
        what: Annotated[
            list[str],
            typer.Argument(
                metavar="WHAT WHAT...",
                help="Two or more expressions.",
                autocompletion=complete_what,
                show_default=False,
            ),
        ],
        prompt: PROMPT = None,
        prompts: PROMPTS = None,
        raw: RAW = False,
        system: SYSTEM = None,
        max_new_tokens: MAX_NEW = 128,
        temperature: TEMPERATURE = None,
        top_p: TOP_P = None,
        top_k: TOP_K = None,
        min_p: MIN_P = None,
        repetition_penalty: PENALTY = None,
        seed: SEED = None,
        stop: STOP = None,
        batch_size: BATCH = 8,
        base: BaseOption = None,
        dtype: DTYPE = "auto",
        device: DEVICE = "auto",
    ) -> Result:
        """Put the same prompts through several stacks, side by side; the base is loaded once."""
        asked = read_prompts(prompt, prompts)
        if asked is None:
            raise Usage("no prompt was given", hint='stackctl compare base style -p "Tell me of rain."')
        check_finite(temperature, top_p, min_p, repetition_penalty)
        stacks = resolve_all(context.registry, what, base)
        from stackctl.engine.generation import Sampling

        sampling = Sampling(
            max_new_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, raw, system, tuple(stop or ())
        )
        check_sampling(sampling, context.output)
        results = compare_stacks(context, stacks, asked, sampling, batch_size, dtype, device)
        notes = tuple(note for stack, _ in stacks for note in stack.notes)
        texts = "\n".join(result["text"] for result in results)
        return Result(
            {"results": results},
            texts,
            lambda: comparison([prompt.text for prompt in asked], what, results),
            notes=notes,
        )


def compare_stacks(
    context: Context,
    stacks: list[tuple[ResolvedStack, StackPlan]],
    prompts: list[Prompt],
    sampling: Sampling,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str = "auto",
) -> list[dict[str, Any]]:
    """Answers of every stack to every prompt, prompt by prompt, stacks in the order asked for."""
    from stackctl.engine.generation import generate
    from stackctl.engine.models import load_base

    registry: Registry = context.registry
    for stack, _ in stacks:
        registry.check_digests(stack.members)
    stacked = load_base(stacks[0][0].base, registry, dtype=dtype, device=device, say=context.output.status)
    answers: list[list[dict[str, Any]]] = []
    with context.output.progress() as progress:
        task = progress.add_task("comparing", total=len(stacks) * len(prompts))
        for stack, plan in stacks:
            stacked.use(plan)
            answers.append([])
            for answer in generate(stacked, prompts, sampling, batch_size=batch_size):
                answers[-1].append(answer_json(stack.text, answer))
                progress.advance(task)
    return [answers[column][row] for row in range(len(prompts)) for column in range(len(stacks))]


def comparison(prompts: list[str], names: list[str], results: list[dict[str, Any]]) -> Any:
    """The answers side by side, a box for each prompt."""
    from rich.console import Group

    from stackctl.tables import side_by_side

    width = len(names)
    rows = [results[start : start + width] for start in range(0, len(results), width)]
    return Group(
        *(
            side_by_side(prompt, names, [r["text"].strip() for r in row])
            for prompt, row in zip(prompts, rows, strict=True)
        )
    )
