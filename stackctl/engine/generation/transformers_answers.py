"""Answer token ids by transformers, with a model as it stands."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import StoppingCriteriaList

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.generation.continuous_batching import ContinuousBatching, places_for
from stackctl.engine.generation.logits_processors import RawLogits, processors, token_logprob
from stackctl.engine.generation.logprobs import TokenBytes, TokenLogprob
from stackctl.engine.generation.plain_decoder import plain_decoder
from stackctl.engine.generation.prefix_cache import PrefixCache
from stackctl.engine.generation.prompts import EncodedPrompts
from stackctl.engine.generation.reader import Generated
from stackctl.engine.generation.sampling import Sampling
from stackctl.engine.generation.stopping import Answer, AnswerCriteria, OnText, endings_of
from stackctl.engine.libraries import replaced
from stackctl.engine.models import StackedModel, cache_argument, evaluating
from stackctl.engine.records.prompt_files import Prompt

if TYPE_CHECKING:
    from transformers._typing import GenerativePreTrainedModel


_Asked = tuple[Answer, list[int], int]
"""An answer that is to be written, the tokens of its prompt, and the seed that it draws with."""


def answer_running(
    asked: EncodedPrompts, stacked: StackedModel, sampling: Sampling, batch_size: int | None
) -> Iterator[tuple[int, Generated]] | None:
    """The answers to prompts by number, as they are finished; None for a model that is answered batch by batch.

    ``batch_size`` is how many at once; None for as many as are quick and fit into memory.
    """
    decoder = plain_decoder(stacked)
    if decoder is None:
        return None
    places = batch_size or places_for(decoder, max(map(len, asked.ids)) + sampling.max_new_tokens)
    running = ContinuousBatching(stacked, decoder, sampling, min(places, len(asked.ids)))
    numbers = {running.add(*one): number for number, one in enumerate(_begun(asked, stacked, sampling, None))}
    return (
        (numbers[row], _generated(asked.prompts[numbers[row]], row.ids, row.answer, row.seconds))
        for row in running.finished()
    )


def answer_encoded(
    asked: EncodedPrompts,
    stacked: StackedModel,
    sampling: Sampling,
    on_text: OnText | None,
    prefix_cache: PrefixCache | None,
) -> list[Generated]:
    """The answers to one batch of token ids."""
    rows = _begun(asked, stacked, sampling, on_text)
    started = time.perf_counter()
    write_answers(rows, stacked, sampling, prefix_cache)
    seconds = time.perf_counter() - started
    return [
        _generated(prompt, ids, answer, seconds) for prompt, (answer, ids, _) in zip(asked.prompts, rows, strict=True)
    ]


def _begun(asked: EncodedPrompts, stacked: StackedModel, sampling: Sampling, on_text: OnText | None) -> list[_Asked]:
    endings = endings_of(stacked, sampling)
    return [
        (Answer(stacked.tokenizer, endings, on_text), ids, seed)
        for ids, seed in zip(asked.ids, asked.seeds, strict=True)
    ]


def _generated(prompt: Prompt, ids: list[int], answer: Answer, seconds: float) -> Generated:
    return Generated(
        prompt, answer.text, len(ids), len(answer.ids), answer.stop, seconds, tuple(ids), tuple(answer.ids)
    )


def write_answers(
    rows: Sequence[_Asked], stacked: StackedModel, sampling: Sampling, prefix_cache: PrefixCache | None = None
) -> None:
    """Have answers written to the end: by a plain decoder, or by transformers' ``generate``.

    Raises:
        Incompatible: transformers cannot generate with this model, or what it computes is no number.
    """
    decoder = plain_decoder(stacked)
    if decoder is None:
        _write_padded(rows, stacked, sampling, prefix_cache)
        return
    running = ContinuousBatching(stacked, decoder, sampling, len(rows), prefix_cache.finished if prefix_cache else None)
    for one in rows:
        running.add(*one)
    for _ in running.finished():
        pass


def _write_padded(
    rows: Sequence[_Asked], stacked: StackedModel, sampling: Sampling, prefix_cache: PrefixCache | None
) -> None:
    """By transformers, prompts padded on the left; it counts positions from each row's first real token."""
    from transformers import GenerationMixin  # a plain decoder does not need it

    answers, batch, seeds = zip(*rows, strict=True)
    width = max(len(ids) for ids in batch)
    known = (stacked.tokenizer.pad_token_id, stacked.tokenizer.eos_token_id)
    pad = next((int(token) for token in known if token is not None), 0)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=stacked.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=stacked.device)
    limit = stacked.base.context_length
    config = GenerationConfig(
        max_new_tokens=min(sampling.max_new_tokens, limit - width) if limit else sampling.max_new_tokens,
        do_sample=False,  # the draw is a processor of ours, and leaves one token to choose
        pad_token_id=pad,
        use_cache=True,
    )
    raw, count = RawLogits(), sampling.top_logprobs
    spell = None if count is None else TokenBytes(stacked.tokenizer)

    def likely(row: int, token: int) -> TokenLogprob | None:
        if spell is None or count is None:
            return None
        return token_logprob(raw.logits[row], token, count, spell, first=not answers[row].ids)

    chosen = processors(sampling, list(map(len, batch)), list(seeds))
    chosen.insert(0, raw)
    answering = AnswerCriteria(answers, width, likely)
    cache = prefix_cache.begin(stacked, batch[0]) if prefix_cache else None
    model = cast("GenerativePreTrainedModel", stacked.model)
    try:
        # ``generate`` fills whatever a configuration leaves open from the model's own; here it finds nothing there.
        with (
            _explained(stacked, input_ids),
            evaluating(stacked.model),
            replaced(stacked.model, "generation_config", GenerationConfig()),
        ):
            model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                generation_config=config,
                logits_processor=chosen,
                stopping_criteria=StoppingCriteriaList([answering]),
                **({} if cache is None else {cache_argument(GenerationMixin.prepare_inputs_for_generation): cache}),
            )
    finally:
        if prefix_cache:
            prefix_cache.keep(answering.computed)
    for answer in answers:
        answer.finish()


@contextlib.contextmanager
def _explained(stacked: StackedModel, input_ids: Tensor) -> Iterator[None]:
    """Tell an error of transformers' own, on a model that it cannot generate with, from one that came from here."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        if not _fails_by_itself(stacked, input_ids, type(error)):
            raise
        raise Incompatible(
            f"transformers cannot generate with '{stacked.base.name}', a {stacked.base.architecture} "
            f"({first_line(error)[:200]})",
            hint="eval and export do not need it",
        ) from error


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
