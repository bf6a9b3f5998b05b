"""stackctl generate"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from stackctl.cli.common import PATH, BaseOption, Context, What, command
from stackctl.errors import Usage
from stackctl.output import Result
from stackctl.yamlfile import read_text

PROMPT = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be given several times.", metavar="TEXT")
]
PROMPTS = Annotated[
    Path | None, typer.Option(help="A file of prompts: one a line, or JSON Lines with a prompt.", metavar="FILE")
]
SYSTEM = Annotated[str | None, typer.Option(help="A system message before the prompt.", rich_help_panel="Generation")]
RAW = Annotated[
    bool,
    typer.Option(
        "--raw", help="Skip the chat template: the model goes on from the text.", rich_help_panel="Generation"
    ),
]
MAX_NEW = Annotated[int, typer.Option(min=1, help="Longest answer in tokens.", rich_help_panel="Generation")]
TEMPERATURE = Annotated[
    float | None,
    typer.Option(min=0, help="Sample at this temperature; greedy without.", rich_help_panel="Generation"),
]
TOP_P = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Sample from the likeliest tokens that make up this share.", rich_help_panel="Generation"
    ),
]
SEED = Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.", rich_help_panel="Generation")]
BATCH = Annotated[int, typer.Option(min=1, help="Prompts that are answered at once.", rich_help_panel="Generation")]
DTYPE = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel="Generation")]
DEVICE = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel="Generation")]


def register(app: typer.Typer) -> None:
    @command(app, "generate", example='stackctl generate storyteller -p "Tell me about the sea."', panel=PATH)
    def generate(
        context: Context,
        what: What = None,
        prompt: PROMPT = None,
        prompts: PROMPTS = None,
        raw: RAW = False,
        system: SYSTEM = None,
        max_new_tokens: MAX_NEW = 256,
        temperature: TEMPERATURE = None,
        top_p: TOP_P = None,
        seed: SEED = None,
        stop: Annotated[
            list[str] | None, typer.Option(help="End the answer before this text.", rich_help_panel="Generation")
        ] = None,
        batch_size: BATCH = 8,
        base: BaseOption = None,
        dtype: DTYPE = "auto",
        device: DEVICE = "auto",
    ) -> Result | None:
        """Write text with a stack, streamed; without -p it reads standard input, or chats on a terminal."""
        registry, output = context.registry, context.output
        stack = registry.resolve(what, base=base)
        plan = registry.plan(stack).check()
        asked = read_prompts(prompt, prompts)
        registry.check_digests(stack.members)
        for note in stack.notes:
            output.note(note)
        check_choices(dtype, device, temperature, top_p)
        from stackctl.engine.generation import Sampling, generate
        from stackctl.engine.models import load_base

        sampling = Sampling(max_new_tokens, temperature, top_p, seed, raw, system, tuple(stop or ()))
        stacked = load_base(stack.base, registry, dtype=dtype, device=device, say=output.status)
        stacked.use(plan)
        if asked is None:
            from stackctl.cli.chat import chat

            chat(stacked, sampling, output, stack.name or stack.text)
            return None
        streams = len(asked) == 1 and not output.json_mode
        for answer in generate(
            stacked, asked, sampling, batch_size=batch_size, on_text=output.text if streams else None
        ):
            if output.json_mode:
                output.line_json(answer_json(stack.name or stack.text, answer))
            else:
                title = "" if len(asked) == 1 or output.quiet else f"> {answer.prompt}\n"
                output.text("\n" if streams else f"{title}{answer.text}\n" + ("" if output.quiet else "\n"))
        return None


def check_choices(dtype: str, device: str, *numbers: float | None) -> None:
    """The names that --dtype and --device know, and numbers that are finite (no range of an option stops ``nan``).

    Raises:
        Usage: another name, or no finite number.
    """
    if not all(math.isfinite(number) for number in numbers if number is not None):
        raise Usage("--temperature and --top-p are finite numbers", hint="leave them out for the likeliest text")
    for option, value, known in (
        ("--dtype", dtype, ("auto", "float32", "bfloat16", "float16")),
        ("--device", device, ("auto", "cpu", "cuda", "mps")),
    ):
        if value not in known:
            raise Usage(f"{option} {value} is not known", hint=f"one of {', '.join(known)}")


def answer_json(stack: str, answer: Any) -> dict[str, Any]:
    """One answer as JSON shows it."""
    return {
        "stack": stack,
        "prompt": answer.prompt,
        "text": answer.text,
        "prompt_tokens": answer.prompt_tokens,
        "new_tokens": answer.new_tokens,
        "stop": answer.stop,
        "tokens_per_second": round(answer.tokens_per_second, 3),
    }


def read_prompts(given: list[str] | None, file: Path | None) -> list[str] | None:
    """The prompts that were asked for; None means: chat, for nobody gave any and this is a terminal.

    Raises:
        Usage: none were given, one is empty, or a line of the file cannot be read.
    """
    prompts = list(given or [])
    if file is not None:
        prompts += _prompts_of(file)
    if given is None and file is None:
        if sys.stdin is None or sys.stdin.isatty():
            return None
        text = sys.stdin.read()
        prompts = [text.removesuffix("\n")]
    if not prompts or any(not prompt.strip() for prompt in prompts):
        raise Usage("the prompt is empty", hint='give one with -p "…", --prompts FILE or on standard input')
    return prompts


def _prompts_of(file: Path) -> list[str]:
    prompts = []
    is_json = file.suffix in (".jsonl", ".json")
    for number, line in enumerate(read_text(file).splitlines(), 1):
        if not line.strip():
            continue
        if not is_json:
            prompts.append(line)
            continue
        try:
            record = json.loads(line)
            prompts.append(record if isinstance(record, str) else record["prompt"])
        except (ValueError, KeyError, TypeError):
            raise Usage(f"{file}, line {number}: no prompt", hint='write {"prompt": "…"} on each line') from None
        if not isinstance(prompts[-1], str):
            raise Usage(f"{file}, line {number}: the prompt is no text", hint='write {"prompt": "…"} on each line')
    return prompts
