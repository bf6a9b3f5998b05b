"""What generate and compare have in common: the prompts, how they are answered, an answer as JSON."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stackctl.cli.engines import DEVICE, DTYPE, ENGINE, Computing
from stackctl.cli.shared_options import TemplateOptions, typed_text
from stackctl.core.errors import StackctlError, Usage, attempt, raise_all
from stackctl.render.output import Output

if TYPE_CHECKING:
    from stackctl.engine.generation import AnswerEngine, Generated, Sampling
    from stackctl.engine.records.prompt_files import Prompt

of_output = partial(typer.Option, rich_help_panel="Output")
_of_sampling = partial(typer.Option, rich_help_panel="Sampling")
_EXACT = 1e-3
"""The share of a stack's change that may go without a word."""

MAX_NEW = Annotated[int, of_output(min=1, help="Longest answer in tokens.")]
RAW = Annotated[bool, of_output(help="Skip the chat template: the model continues the text.")]
SYSTEM = Annotated[str | None, of_output(parser=typed_text, help="A system message before the prompt.")]


def idle_with_raw(raw: bool, options: dict[str, Any]) -> Iterator[Usage]:
    """What is wrong with ``--raw`` and options that only a chat template obeys, by their names."""
    if raw and (idle := [name for name, value in options.items() if value is not None]):
        what = f"--raw goes on from the text as it stands, and {', '.join(idle)} would change nothing"
        yield Usage(what, hint=f"leave out --raw, or {', '.join(idle)}")


@dataclass(frozen=True)
class PromptOptions:
    """What is answered; each field is an option."""

    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", parser=typed_text, help="A prompt; may be given several times.", metavar="TEXT"),
    ] = None
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A file of prompts: one a line, or records of {'prompt'} or {'messages'} (JSON, CSV, Parquet).",
            metavar="FILE",
        ),
    ] = None


@dataclass(frozen=True)
class GenerateOptions(TemplateOptions):
    """How to answer. Each field is an option of generate and of compare, with its help and its default."""

    raw: RAW = False
    system: SYSTEM = None
    temperature: Annotated[
        float | None, _of_sampling(min=0, help="Sampling temperature; greedy decoding without it.")
    ] = None
    top_p: Annotated[
        float | None,
        _of_sampling(min=0, max=1, help="Nucleus sampling: the most likely tokens that add up to this probability."),
    ] = None
    top_k: Annotated[int | None, _of_sampling(min=1, help="Sample from the N most likely tokens.")] = None
    min_p: Annotated[
        float | None,
        _of_sampling(min=0, max=1, help="Drop tokens below this share of the most likely token's probability."),
    ] = None
    repetition_penalty: Annotated[
        float | None, _of_sampling(min=0, help="Above 1, tokens that occurred before become less likely.")
    ] = None
    seed: Annotated[int | None, _of_sampling(min=0, help="Seed for sampling.")] = None
    stop: Annotated[list[str] | None, of_output(parser=typed_text, help="Stop before this text; may be repeated.")] = (
        None
    )
    batch_size: Annotated[
        int | None, of_output(min=1, help="Prompts answered at once; left out, as many as suit model and memory.")
    ] = None
    dtype: DTYPE = "auto"
    device: DEVICE = "auto"
    engine: ENGINE = "auto"

    @property
    def computing(self) -> Computing:
        return Computing(self.engine, self.dtype, self.device)

    def check(self, output: Output, *, measures: bool = False) -> None:
        """What the ranges of the options leave open; a note says so where an option has nothing to choose from.

        ``measures``: records are measured as well, which the chat template lays out whatever becomes of prompts.

        Raises:
            Usage: an option makes no sense.
        """
        of_template: dict[str, Any] = {"--system": self.system}
        if not measures:
            of_template["--chat-template-kwargs"] = self.chat_template_kwargs
            of_template["--enable-thinking"] = self.enable_thinking
        problems = [*self._problems(), *idle_with_raw(self.raw, of_template)]
        attempt(problems, self.template)
        attempt(problems, self.computing.check)
        raise_all(problems)
        options = {"--top-p": self.top_p, "--top-k": self.top_k, "--min-p": self.min_p}
        if not self.temperature and (idle := [name for name, value in options.items() if value is not None]):
            output.note(f"without --temperature decoding is greedy: {', '.join(idle)} changes nothing")

    def _problems(self) -> Iterator[StackctlError]:
        numbers = (self.temperature, self.top_p, self.min_p, self.repetition_penalty)
        if not all(math.isfinite(number) for number in numbers if number is not None):  # no range stops ``nan``
            what = "--temperature, --top-p, --min-p and --repetition-penalty are finite numbers"
            yield Usage(what, hint="leave them out for greedy decoding")
        if self.repetition_penalty == 0:
            yield Usage("--repetition-penalty is larger than 0", hint="1 changes nothing, 1.1 is usual")
        if any(not text for text in self.stop or ()):
            yield Usage("--stop is empty", hint="leave it out, or name a text")

    def sampling(self, max_new_tokens: int) -> Sampling:
        """The same as the engine takes it."""
        from stackctl.engine.generation import Sampling

        return Sampling(
            max_new_tokens, self.temperature, self.top_p, self.top_k, self.min_p, self.repetition_penalty, self.seed,
            self.raw, self.system, tuple(self.stop or ()), self.template(),
        )  # fmt: skip


def read_prompts(asked: PromptOptions) -> list[Prompt] | None:
    """The prompts that were asked for; None means: chat, for nobody gave any and this is a terminal.

    Raises:
        NotFound, Usage: none were given, one is empty, or the file cannot be read.
    """
    from stackctl.engine.records.prompt_files import Prompt, read_prompt_file

    given, file = asked.prompt, asked.prompts
    several = len(given or ()) > 1
    prompts = [
        Prompt(text, place=f"prompt {number}" if several else "the prompt")
        for number, text in enumerate(given or (), 1)
    ]
    if file is not None:
        prompts += read_prompt_file(file)
    if given is None and file is None:
        if sys.stdin.isatty():
            return None
        prompts = [Prompt(_read_stdin().removesuffix("\n"))]
    empty = [prompt.place for prompt in prompts if not prompt.text.strip()]
    if empty or not prompts:
        what = "; ".join(f"{place} is empty" for place in empty) or f"{file} holds no prompts"
        raise Usage(what, hint='give one with -p "…", --prompts FILE or on standard input')
    return prompts


def _read_stdin() -> str:
    try:
        text = sys.stdin.read()
        text.encode()  # in the C locale, Python takes other bytes for halves of characters
    except UnicodeError:
        raise Usage("standard input is not UTF-8", hint="convert it first, with iconv for example") from None
    return text.removeprefix("\ufeff")  # a byte-order mark, as PowerShell puts one before a pipe


def say_what_rounding_costs(
    stacked: AnswerEngine, output: Output, *, of: str = "the stack", instead: str = "--dtype float32 or --live"
) -> None:
    """A note when the weights that the stack was folded into are too coarse to hold it exactly."""
    if stacked.rounding_error > _EXACT:
        kind = stacked.precision.partition(" ")[0]
        output.note(
            f"folding in {kind} loses {stacked.rounding_error:.2g} of {of}'s change to rounding; {instead} keeps it"
        )


def answer_json(stack: str, answer: Generated, stacked: AnswerEngine) -> dict[str, Any]:
    """One answer as JSON shows it, by the stack that is in use."""
    messages = answer.prompt.messages
    return {
        "stack": stack,
        "prompt": answer.prompt.text,
        **({"messages": messages} if messages is not None else {}),
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "stop": answer.stop,
        "tokens_per_second": round(answer.tokens_per_second, 3),
        "rounding_error": stacked.rounding_error,
    }
