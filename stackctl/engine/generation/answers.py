"""Answer prompts with whatever engine there is: in batches of like length, or one by one and streamed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, cast

from stackctl.engine.generation.padding import can_pad
from stackctl.engine.generation.prompts import EncodedPrompts, encode_prompts
from stackctl.engine.generation.reader import AnswerEngine, Generated
from stackctl.engine.generation.sampling import Sampling, row_seeds
from stackctl.engine.generation.stopping import OnText
from stackctl.engine.records.prompt_files import Prompt

if TYPE_CHECKING:
    from stackctl.engine.generation.prefix_cache import PrefixCache
    from stackctl.engine.models import StackedModel

_PADDED = 8
"""Prompts in a batch that is padded, unless so many are asked for."""
_WINDOW = 16
"""Batches within which prompts are sorted by length: enough to waste little, few enough for answers to come soon."""


class TokenEngine(AnswerEngine, Protocol):
    """An engine that is not transformers in this process, and takes token ids."""

    def answer_encoded(self, asked: EncodedPrompts, sampling: Sampling, on_text: OnText | None) -> list[Generated]:
        """The answers to prompts, in order."""


def generate(
    stacked: AnswerEngine,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int | None = None,
    on_text: OnText | None = None,
    prefix_cache: PrefixCache | None = None,
) -> Iterator[Generated]:
    """Answer prompts, in order; with ``on_text`` one by one, each streamed as it comes.

    What ``prefix_cache`` holds of an earlier one is not computed again; that is for prompts one by one, and for
    transformers: another engine keeps a cache by itself.

    ``batch_size`` is how many are answered at once; left out, what suits the model.

    Raises:
        Usage: a prompt is empty or does not fit the context.
    """
    encoded = encode_prompts(stacked, prompts, sampling)
    waiting: dict[int, Generated] = {}
    following = 0
    asked = EncodedPrompts(prompts, encoded, row_seeds(sampling.seed, map(tuple, encoded)))
    for rows, answers in _answered(stacked, asked, sampling, batch_size, on_text, prefix_cache):
        waiting.update(zip(rows, answers, strict=True))
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def _answered(
    stacked: AnswerEngine,
    asked: EncodedPrompts,
    sampling: Sampling,
    batch_size: int | None,
    on_text: OnText | None,
    prefix_cache: PrefixCache | None,
) -> Iterator[tuple[list[int], list[Generated]]]:
    """Answers with their numbers, as they are there: of a batch that rows join and leave, or batch by batch."""
    if hasattr(stacked, "answer_encoded"):
        answer, together = functools.partial(cast(TokenEngine, stacked).answer_encoded, on_text=on_text), True
    else:
        from stackctl.engine.generation.transformers_answers import (  # with torch, which others do without
            answer_encoded,
            answer_running,
        )

        own = cast("StackedModel", stacked)
        if not on_text and asked.prompts:
            running = answer_running(asked, own, sampling, batch_size)
            if running is not None:
                yield from (([row], [generated]) for row, generated in running)
                return
        together = can_pad(own.model, max(map(len, asked.ids), default=0) + sampling.max_new_tokens)
        answer = functools.partial(answer_encoded, stacked=own, on_text=on_text, prefix_cache=prefix_cache)
    limit = stacked.base.context_length
    longest = limit - sampling.max_new_tokens if limit else None
    size = (batch_size or _PADDED) if together and not on_text else 1
    for rows in batches([len(ids) for ids in asked.ids], size, longest):
        yield rows, answer(asked.of(rows), sampling=sampling)


def batches(lengths: Sequence[int], size: int, longest: int | None = None) -> Iterator[list[int]]:
    """Which prompts to answer together, by number: those of like length among every so many.

    One that is longer than ``longest``, whose answer the context may cut short, stands alone.
    """
    for start in range(0, len(lengths), size * _WINDOW):
        window = range(start, min(start + size * _WINDOW, len(lengths)))
        fitting = sorted((i for i in window if longest is None or lengths[i] <= longest), key=lambda i: lengths[i])
        together = [fitting[at : at + size] for at in range(0, len(fitting), size)]
        yield from sorted([*together, *([i] for i in window if i not in set(fitting))], key=min)


def generate_reply(
    stacked: AnswerEngine, prompt: Prompt, sampling: Sampling, on_text: OnText, prefix_cache: PrefixCache | None = None
) -> Generated:
    """The answer to one prompt, streamed."""
    return next(generate(stacked, [prompt], sampling, on_text=on_text, prefix_cache=prefix_cache))
