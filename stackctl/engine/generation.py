"""Text from a base with a stack folded into it: prompts to tokens, streamed or in batches."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, TextStreamer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from stackctl.engine.data import end_of_turn, ensure_chat_template
from stackctl.engine.models import StackedModel, evaluating
from stackctl.errors import Usage

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens: greedy when ``temperature`` is None."""

    max_new_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    raw: bool = False
    system: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generated:
    """One answer. ``stop`` says why it ended: ``end`` (of turn or text), ``stop`` (a stop text) or ``length``."""

    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int
    stop: str
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0


def generate(
    stacked: StackedModel,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    batch_size: int = 8,
    on_text: Callable[[str], None] | None = None,
) -> Iterator[Generated]:
    """Answer prompts, in order; with ``on_text`` one by one, each streamed as it comes.

    Raises:
        Usage: a prompt is empty or does not fit the context.
    """
    encoded = [encode_prompt(stacked, [{"role": "user", "content": p}], sampling, prompt=p) for p in prompts]
    limit = stacked.base.context_length
    longest = limit - sampling.max_new_tokens if limit else None
    for start, end in _batches(encoded, 1 if on_text else max(batch_size, 1), longest):
        yield from _run_batch(stacked, list(prompts[start:end]), encoded[start:end], sampling, on_text)


def _batches(encoded: Sequence[list[int]], size: int, longest: int | None) -> Iterator[tuple[int, int]]:
    """Which prompts to answer together, as (start, end); one whose answer the context may cut short stands alone."""

    def is_long(position: int) -> bool:
        return longest is not None and len(encoded[position]) > longest

    start = 0
    while start < len(encoded):
        end = start + 1
        while end < min(start + size, len(encoded)) and not is_long(start) and not is_long(end):
            end += 1
        yield start, end
        start = end


def encode_prompt(stacked: StackedModel, messages: Messages, sampling: Sampling, *, prompt: str) -> list[int]:
    """A prompt as the model is to read it: through the chat template, or with ``raw`` as it stands.

    Raises:
        Usage: it is empty, or leaves no room for an answer.
    """
    tokenizer = stacked.tokenizer
    if not prompt.strip():
        raise Usage("the prompt is empty", hint='give one with -p "…", --prompts FILE or on standard input')
    ids: list[int]
    if sampling.raw:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    else:
        ensure_chat_template(tokenizer)
        system = [{"role": "system", "content": sampling.system}] if sampling.system else []
        try:
            text = tokenizer.apply_chat_template([*system, *messages], add_generation_prompt=True, tokenize=False)
        except Exception as error:  # a template is a program of its author's
            raise Usage(
                f"the chat template refused the prompt: {error}", hint="try --raw, or leave out --system"
            ) from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    limit = stacked.base.context_length
    if limit and len(ids) >= limit:
        raise Usage(
            f"the prompt has {len(ids)} tokens, and {stacked.base.name} reads {limit} at once",
            hint="shorten the prompt",
        )
    return ids


def _run_batch(
    stacked: StackedModel,
    prompts: list[str],
    batch: list[list[int]],
    sampling: Sampling,
    on_text: Callable[[str], object] | None,
) -> Iterator[Generated]:
    width = max(len(ids) for ids in batch)
    pad = _pad_token(stacked)
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in batch], device=stacked.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch], device=stacked.device)
    limit = stacked.base.context_length
    room = min(sampling.max_new_tokens, limit - width) if limit else sampling.max_new_tokens
    ends = end_tokens(stacked)
    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)
    stops = _stop_texts(stacked, sampling)
    stopper = _StopText(stacked.tokenizer, stops, width) if stops else None
    started = time.perf_counter()
    with evaluating(stacked.model), _without_defaults(stacked.model):
        output: Any = stacked.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=_generation_config(sampling, room, ends, pad),
            streamer=_Streamer(stacked.tokenizer, on_text) if on_text else None,
            stopping_criteria=StoppingCriteriaList([stopper]) if stopper else None,
        )
    seconds = time.perf_counter() - started
    for prompt, ids, row in zip(prompts, batch, output[:, width:].tolist(), strict=True):
        new, stop = _cut(row, ends)
        text = stacked.tokenizer.decode(new, skip_special_tokens=True)
        if found := [(text.index(end), end) for end in stops if end in text]:
            position, end = min(found)
            text, stop = text[:position], "stop" if end in sampling.stop else "end"
        yield Generated(prompt, text, len(ids), len(new), stop, seconds)


def _generation_config(sampling: Sampling, room: int, ends: list[int], pad: int) -> GenerationConfig:
    """Ours alone: a base's own generation defaults (temperature, penalties) must not change what was asked for."""
    greedy = sampling.temperature is None or sampling.temperature == 0
    chosen: dict[str, Any] = (
        {}
        if greedy
        else {"temperature": sampling.temperature, "top_p": 1.0 if sampling.top_p is None else sampling.top_p}
    )
    return GenerationConfig(
        max_new_tokens=room,
        do_sample=not greedy,
        top_k=None if greedy else 0,
        eos_token_id=ends,
        pad_token_id=pad,
        use_cache=True,
        **chosen,
    )


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


def end_tokens(stacked: StackedModel) -> list[int]:
    """Every token that ends an answer: the tokenizer's and the base's EOS, and the chat template's end of turn."""
    found = {stacked.tokenizer.eos_token_id}
    configured = getattr(stacked.model.generation_config, "eos_token_id", None)
    found.update(configured if isinstance(configured, list) else [configured])
    turn = _end_of_turn_ids(stacked)
    if len(turn) == 1:
        found.add(turn[0])
    return sorted(token for token in found if token is not None)


def _end_of_turn_ids(stacked: StackedModel) -> list[int]:
    if not stacked.tokenizer.chat_template:
        return []
    ids: list[int] = stacked.tokenizer(end_of_turn(stacked.tokenizer), add_special_tokens=False)["input_ids"]
    return ids


def _stop_texts(stacked: StackedModel, sampling: Sampling) -> tuple[str, ...]:
    """What was asked for, and the end of turn where it is a text of several tokens (ChatML on a base without it)."""
    turn = end_of_turn(stacked.tokenizer) if stacked.tokenizer.chat_template and not sampling.raw else ""
    return (*sampling.stop, turn) if turn and len(_end_of_turn_ids(stacked)) > 1 else sampling.stop


def _cut(row: list[int], ends: list[int]) -> tuple[list[int], str]:
    for index, token in enumerate(row):
        if token in ends:
            return row[:index], "end"
    return row, "length"


class _Streamer(TextStreamer):
    """Hands finished pieces of text on instead of printing them."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


class _StopText(StoppingCriteria):
    """Ends a row when one of some texts has appeared in it."""

    def __init__(self, tokenizer: Any, texts: tuple[str, ...], start: int) -> None:
        self._tokenizer, self._texts, self._start = tokenizer, texts, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        rows = [self._tokenizer.decode(row[self._start :], skip_special_tokens=True) for row in input_ids]
        done = [any(text in row for text in self._texts) for row in rows]
        return torch.tensor(done, device=input_ids.device)


def generate_reply(
    stacked: StackedModel, messages: Messages, sampling: Sampling, on_text: Callable[[str], object]
) -> Generated:
    """The answer to a conversation, streamed."""
    last = messages[-1]["content"]
    ids = encode_prompt(stacked, messages, sampling, prompt=last)
    return next(_run_batch(stacked, [last], [ids], sampling, on_text))
