"""Prompts as a model is to read them: through the chat template, or as they stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stackctl.core.errors import Incompatible, StackctlError, Usage, raise_all
from stackctl.engine.data.chat_template import TEMPLATE_ERRORS, ChatTemplate, ensure_chat_template, prefix_ids
from stackctl.engine.data.conversation import render_prompt
from stackctl.engine.data.embedded_tokens import check_prompt
from stackctl.engine.generation.reader import Reader
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.records.prompt_files import Prompt
from stackctl.engine.records.types import Message

_SHOWN = 5


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts, the token ids of each, and the seed that each draws with."""

    prompts: Sequence[Prompt]
    ids: Sequence[list[int]]
    seeds: Sequence[int]

    def of(self, numbers: Sequence[int]) -> EncodedPrompts:
        """Some of them, by number."""
        return EncodedPrompts(
            [self.prompts[i] for i in numbers], [self.ids[i] for i in numbers], [self.seeds[i] for i in numbers]
        )


def encode_prompts(reader: Reader, prompts: Sequence[Prompt], sampling: Sampling) -> list[list[int]]:
    """The token ids of every prompt.

    Raises:
        Usage, Incompatible: some are empty, refused by the template, leave no room for an answer, or use tokens that
            the base has no row for; the first five are named.
    """
    encoded: list[list[int]] = []
    problems: list[StackctlError] = []
    for prompt in prompts:
        try:
            encoded.append(_encode(reader, prompt, sampling))
            _check_fit(reader, prompt, encoded[-1])
        except (Usage, Incompatible) as error:
            problems.append(error)
    if len(problems) > _SHOWN:
        more = Usage(f"and {len(problems) - _SHOWN} more", hint=problems[0].hint)
        problems = [*problems[:_SHOWN], more]
    raise_all(problems)
    return encoded


def fit_conversation(reader: Reader, messages: Sequence[Message], sampling: Sampling) -> list[Message]:
    """A conversation without its oldest exchanges, as far as the context asks for it: half of it, at most, is kept
    free for the answer.

    Raises:
        Usage: the template refuses it.
    """
    limit = reader.base.context_length
    starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
    for start in [0, *starts[1:]]:
        kept = list(messages[start:])
        length = len(_encode(reader, Prompt(kept[-1]["content"], kept), sampling))
        if not limit or length + min(sampling.max_new_tokens, limit // 2) <= limit:
            break
    return kept


def _check_fit(reader: Reader, prompt: Prompt, ids: list[int]) -> None:
    limit = reader.base.context_length
    if limit and len(ids) >= limit:
        raise Usage(
            f"{prompt.place} has {len(ids)} tokens, and {reader.base.name} reads {limit} at once", hint="shorten it"
        )
    check_prompt(ids, reader.base.vocabulary_size, prompt.place, reader.tokenizer, reader.base.name)


def _encode(reader: Reader, prompt: Prompt, sampling: Sampling) -> list[int]:
    tokenizer = reader.tokenizer
    if not prompt.text.strip():
        raise Usage(f"{prompt.place} is empty", hint='give one with -p "…", --prompts FILE or on standard input')
    if not sampling.raw:
        ensure_chat_template(tokenizer)
        try:
            text = render_prompt(
                ChatTemplate(tokenizer),
                _conversation(prompt, sampling.system),
                prompt.tools,
                {**(reader.base.chat_template_kwargs or {}), **sampling.template, **prompt.template},
            )
        except TEMPLATE_ERRORS as error:
            raise Usage(
                f"the chat template refused {prompt.place}: {error}", hint="try --raw, or without --system or tools"
            ) from error
    elif prompt.messages is None:
        text = prompt.text
    else:
        raise Usage(f"--raw goes on from a text, and {prompt.place} is a conversation", hint="leave out --raw")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    before = prefix_ids(tokenizer) if sampling.raw else []  # as in training; not twice where it was typed
    return ids if ids[: len(before)] == before else [*before, *ids]


def _conversation(prompt: Prompt, system: str | None) -> list[Message]:
    """The messages of a prompt; what the option says takes the place of its own system message."""
    messages = prompt.messages or [{"role": "user", "content": prompt.text}]
    if not system:
        return messages
    own = messages[0]["role"] == "system"
    return [{"role": "system", "content": system}, *messages[own:]]
