"""Answer prompts with a model as it stands: in batches of like length, or one by one and streamed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.generation.logprobs import RawLogits, TokenBytes
from stackctl.engine.generation.prefix_cache import Remembered
from stackctl.engine.generation.prompts import encode_prompts
from stackctl.engine.generation.reader import Answers
from stackctl.engine.generation.sampling import Sampling, processors, row_seeds
from stackctl.engine.generation.stopping import Answer, Answering, OnText, end_tokens, turn_text
from stackctl.engine.models import StackedModel, evaluating
from stackctl.engine.records import Prompt

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel

_WINDOW = 16
"""Batches within which prompts are sorted by length: enough to waste little, few enough for answers to come soon."""


@dataclass(frozen=True)
class Generated:
    """One answer. ``stop`` says why it ended: ``end`` (of turn or text), ``stop`` (a stop text) or ``length``.

    ``asked`` and ``ids`` are the tokens of the prompt, as the model read it, and those that it wrote.
    """

    prompt: Prompt
    text: str
    prompt_tokens: int
    new_tokens: int
    stop: str
    seconds: float
    asked: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0


class OtherEngine(Answers, Protocol):
    """An engine that is not transformers in this process, and takes token ids."""

    def answer_encoded(
        self,
        prompts: Sequence[Prompt],
        batch: Sequence[list[int]],
        seeds: Sequence[int],
        sampling: Sampling,
        on_text: OnText | None,
    ) -> list[Generated]:
        """The answers to prompts, in order."""


def generate(
    stacked: Answers,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    on_text: OnText | None = None,
    remembered: Remembered | None = None,
) -> Iterator[Generated]:
    """Answer prompts, in order; with ``on_text`` one by one, each streamed as it comes.

    What is ``remembered`` of an earlier one is not computed again; that is for prompts one by one, and for
    transformers: another engine remembers by itself.

    Raises:
        Usage: a prompt is empty or does not fit the context.
    """
    encoded = encode_prompts(stacked, prompts, sampling)
    seeds = row_seeds(sampling.seed, map(tuple, encoded))
    limit = stacked.base.context_length
    longest = limit - sampling.max_new_tokens if limit else None
    waiting: dict[int, Generated] = {}
    following = 0
    for rows in batches([len(ids) for ids in encoded], 1 if on_text else batch_size, longest):
        asked, ids = [prompts[i] for i in rows], [encoded[i] for i in rows]
        own = [seeds[i] for i in rows]
        if isinstance(stacked, StackedModel):
            answers = answer_encoded(asked, ids, own, stacked, sampling, on_text, remembered)
        else:
            answers = cast(OtherEngine, stacked).answer_encoded(asked, ids, own, sampling, on_text)
        waiting.update(zip(rows, answers, strict=True))
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def batches(lengths: Sequence[int], size: int, longest: int | None = None) -> Iterator[list[int]]:
    """Which prompts to answer together, by number: those of like length among every so many.

    One that is longer than ``longest``, whose answer the context may cut short, stands alone.
    """
    for start in range(0, len(lengths), size * _WINDOW):
        window = range(start, min(start + size * _WINDOW, len(lengths)))
        fitting = sorted((i for i in window if longest is None or lengths[i] <= longest), key=lambda i: lengths[i])
        together = [fitting[at : at + size] for at in range(0, len(fitting), size)]
        yield from sorted([*together, *([i] for i in window if i not in set(fitting))], key=min)


def answer_encoded(
    prompts: Sequence[Prompt],
    batch: Sequence[list[int]],
    seeds: list[int],
    stacked: StackedModel,
    sampling: Sampling,
    on_text: OnText | None,
    remembered: Remembered | None,
) -> list[Generated]:
    """The answers to one batch of token ids."""
    ends, turn = end_tokens(stacked), "" if sampling.raw else turn_text(stacked)
    answers = [Answer(stacked.tokenizer, ends, sampling.stop, turn, on_text) for _ in batch]
    started = time.perf_counter()
    write_answers(answers, batch, seeds, stacked, sampling, remembered)
    seconds = time.perf_counter() - started
    return [
        Generated(prompt, answer.text, len(ids), len(answer.ids), answer.stop, seconds, tuple(ids), tuple(answer.ids))
        for prompt, ids, answer in zip(prompts, batch, answers, strict=True)
    ]


def write_answers(
    answers: Sequence[Answer],
    batch: Sequence[list[int]],
    seeds: list[int],
    stacked: StackedModel,
    sampling: Sampling,
    remembered: Remembered | None = None,
) -> None:
    """Have answers written to the end, of prompts as token ids, padded on the left.

    transformers counts positions from each row's first real token.

    Raises:
        Incompatible: transformers cannot generate with this model.
    """
    width = max(len(ids) for ids in batch)
    pad = _pad_token(stacked)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=stacked.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=stacked.device)
    limit = stacked.base.context_length
    config = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, limit - width) if limit else sampling.max_new_tokens,
        do_sample=False,  # the draw is a processor of ours, and leaves one token to choose
        pad_token_id=pad,
        use_cache=True,
    )
    chosen = processors(sampling, [len(ids) for ids in batch], seeds)
    answering = Answering(answers, width)
    if sampling.top_logprobs is not None:
        raw = RawLogits(TokenBytes(stacked.tokenizer), sampling.top_logprobs)
        chosen.insert(0, raw)
        answering = Answering(answers, width, lambda row, token: raw.likely(row, token, first=not answers[row].ids))
    cache = remembered.begin(stacked, batch[0]) if remembered else None
    try:
        with evaluating(stacked.model), _without_defaults(stacked.model):
            cast("GenerativePreTrainedModel", stacked.model).generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=chosen,
                stopping_criteria=StoppingCriteriaList([answering]),
                **({} if cache is None else {"past_key_values": cache}),
            )
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        if _fails_by_itself(stacked, input_ids, type(error)):
            raise Incompatible(
                f"transformers cannot generate with '{stacked.base.name}', a {stacked.base.architecture} "
                f"({first_line(error)[:200]})",
                hint="eval and export do not need it",
            ) from error
        raise
    finally:
        if remembered:
            remembered.keep(answering.computed)
    for answer in answers:
        answer.finish()


def _fails_by_itself(stacked: StackedModel, input_ids: Tensor, kind: type[Exception]) -> bool:
    """Whether transformers' ``generate`` fails alike when nothing of ours is in it."""
    try:
        with evaluating(stacked.model):
            model = cast("GenerativePreTrainedModel", stacked.model)
            model.generate(input_ids=input_ids[:1, -1:].repeat(1, 4), max_new_tokens=2, do_sample=False)
    except kind:
        return True
    except Exception:
        return False
    return False


@contextlib.contextmanager
def _without_defaults(model: Any) -> Iterator[None]:
    """``generate`` fills whatever a configuration leaves open from the model's own; here it finds nothing there."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _pad_token(stacked: StackedModel) -> int:
    tokenizer = stacked.tokenizer
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def generate_reply(
    stacked: Answers, prompt: Prompt, sampling: Sampling, on_text: OnText, remembered: Remembered | None = None
) -> Generated:
    """The answer to one prompt, streamed."""
    return next(generate(stacked, [prompt], sampling, on_text=on_text, remembered=remembered))
