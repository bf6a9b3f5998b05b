"""Answers by llama.cpp: of one stack at a time for a command, of any stacks for the server.

Prompts are rendered, tokenised and cut off here, as for transformers; llama.cpp computes and chooses. It decodes
together what has the same scales, and answers different stacks one after another.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stackctl.core import Say
from stackctl.engine.generation import Generated, Sampling
from stackctl.engine.generation.logprobs import TokenBytes, TokenLogprob, not_finite
from stackctl.engine.generation.prompts import EncodedPrompts
from stackctl.engine.generation.reader import PlainReader
from stackctl.engine.generation.stopping import OnText, endings_of
from stackctl.engine.llama_cpp.scaled_adapters import Scaled, scaled_adapters
from stackctl.engine.llama_cpp.server import Server, Settings
from stackctl.engine.serving.requests import Engine, FieldRefused, Limits, Row
from stackctl.plan.stack_plan import StackPlan

_ORDER = ["penalties", "temperature", "top_k", "top_p", "min_p"]
"""In which transformers applies them."""
_LARGE = 100.0
"""The scale of an adapter from which on its sums are looked at: below it they overflow in no model that was trained."""
_STOPS = {"eos": "end", "limit": "length"}


@dataclass(eq=False)
class LlamaRow(Row):
    """``adapters`` are the files of its stack's adapters with their scales."""

    adapters: Scaled = field(default_factory=dict)
    made: int = 0

    @property
    def new_tokens(self) -> int:
        return self.made


class LlamaCpp(Engine[LlamaRow]):
    """A base in llama.cpp. ``plan`` is the stack that :meth:`answer_encoded` answers with; rows bring their own.

    llama.cpp takes adapters only when it starts: where a stack needs one that is not there, what runs is waited for,
    and it starts again with that one as well.
    """

    row = LlamaRow
    decodes = False
    rounding_error = 0.0

    def __init__(self, reader: PlainReader, folder: Path, settings: Settings, say: Say = lambda _: None) -> None:
        super().__init__(reader, Limits(rows=settings.slots))
        self.base, self.tokenizer, self.generation_config = reader.base, reader.tokenizer, reader.generation_config
        self.plan: StackPlan | None = None
        self._folder, self._settings, self._say = folder, settings, say
        self._spell = TokenBytes(reader.tokenizer)
        self._server: Server | None = None
        self._loaded: OrderedDict[Path, int] = OrderedDict()
        self._running: set[LlamaRow] = set()
        self._thread.start()

    @property
    def precision(self) -> str:
        return f"{self._settings.gguf.name} in llama.cpp"

    # -- of a command -------------------------------------------------------------------------------------------

    def use(self, plan: StackPlan, *, live: bool = False) -> None:
        """Answer with another stack from now on; in llama.cpp each is kept beside the base.

        Raises:
            Incompatible, VerificationFailed: llama.cpp cannot run it, or a tensor is damaged.
        """
        self.warm([plan])
        self.plan = plan

    def answer_encoded(self, asked: EncodedPrompts, sampling: Sampling, on_text: OnText | None) -> list[Generated]:
        """The answers to token ids, with the stack that is in use."""
        assert self.plan is not None, "use() comes first"
        endings = endings_of(self, sampling)
        rows = [
            self._new_row((self.plan, prompt, sampling), ids, seed, endings, on_text is not None)
            for prompt, ids, seed in zip(asked.prompts, asked.ids, asked.seeds, strict=True)
        ]
        ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        for row in rows:
            row.on_text = on_text
            row.on_end = lambda _, error: ended.put(error)
        self.equip(self.plan, rows)
        started = time.perf_counter()
        try:
            for at in range(0, len(rows), self.limits.wait):
                together = rows[at : at + self.limits.wait]
                self.submit(together)
                for _ in together:
                    if (error := ended.get()) is not None:
                        raise error
        finally:
            for row in rows:
                row.cancelled.set()
        seconds = time.perf_counter() - started
        return [Generated(r.prompt, r.text, len(r.ids), r.new_tokens, r.stop, seconds) for r in rows]

    # -- from any thread ----------------------------------------------------------------------------------------

    def equip(self, plan: StackPlan, rows: Sequence[LlamaRow]) -> None:
        adapters = scaled_adapters(plan, self._folder, self._settings.gguf, self._say)
        for row in rows:
            row.adapters = adapters

    def warm(self, plans: Sequence[StackPlan]) -> None:
        found: Scaled = {}
        for plan in plans:
            found |= scaled_adapters(plan, self._folder, self._settings.gguf, self._say)
        self._load(found)

    def close(self) -> None:
        with self._changed:
            for row in self._running:
                row.cancelled.set()
        super().close()
        if self._server is not None:
            self._server.close()

    # -- the engine's own thread --------------------------------------------------------------------------------

    def run(self) -> None:
        while (row := self._next()) is not None:
            try:
                server, scales = self._load(row.adapters)
            except Exception as error:
                self._finish(row, error)
            else:
                threading.Thread(target=self._answer, args=(row, server, scales), daemon=True).start()
        self._stopped()

    def _next(self) -> LlamaRow | None:
        """The row at the head of the queue, once it may begin; None when the engine is closed."""
        with self._changed:
            while not self._closed:
                head = self._waiting[0] if self._waiting else None
                if head is not None and head.cancelled.is_set():
                    self._waiting.popleft().end(None)
                elif head is not None and self._may_begin(head):
                    self._running.add(head)
                    return self._waiting.popleft()
                else:
                    self._changed.wait()
            self._changed.wait_for(lambda: not self._running)
        return None

    def _may_begin(self, row: LlamaRow) -> bool:
        """Whether a slot, room in the context that all share, and the row's adapters are there."""
        if not self._running:
            return True
        if len(self._running) >= self._settings.slots or not set(row.adapters) <= set(self._loaded):
            return False
        return sum(_tokens(other) for other in (row, *self._running)) <= self._settings.context

    def _load(self, adapters: Scaled) -> tuple[Server, list[dict[str, float]]]:
        """llama.cpp with these adapters among others, and the scales of all by their numbers there."""
        if self._server is None or not set(adapters) <= set(self._loaded):
            kept = list(self._loaded)[-self.limits.adapters :] if self._loaded else []
            wanted = list(dict.fromkeys([*(path for path in kept if path.exists()), *adapters]))
            if self._server is not None:
                self._server.close()
            self._server, self._loaded = None, OrderedDict()
            self._server = Server(self._settings, wanted)
            self._loaded = OrderedDict((path, number) for number, path in enumerate(wanted))
        for path in adapters:
            self._loaded.move_to_end(path)
        # All of them: with none named, llama.cpp goes on from what it computed of the prompt with other scales.
        return self._server, [{"id": number, "scale": adapters.get(p, 0.0)} for p, number in self._loaded.items()]

    # -- a thread of each row -----------------------------------------------------------------------------------

    def _answer(self, row: LlamaRow, server: Server, scales: list[dict[str, float]]) -> None:
        error: Exception | None = None
        try:
            for said in server.complete(_body(row, scales), lambda: not row.cancelled.is_set()):
                likely = self._likely(row, said)
                row.made = said["tokens_predicted"]
                row.answer.add_piece(said["content"], said.get("tokens", ()), likely)
                if row.answer.stop:
                    row.made -= row.answer.stop == "end"  # the token that ended it is none of its own
                    break
                if said["stop"]:
                    ended = _STOPS.get(said.get("stop_type", ""), "length")
                    row.made -= ended == "end"
                    row.answer.finish(ended)
        except Exception as failed:
            error = failed
        self._finish(row, error)

    def _likely(self, row: LlamaRow, said: dict[str, Any]) -> list[TokenLogprob]:
        """How likely the tokens of a piece were, if that was asked for.

        Raises:
            FieldRefused: llama.cpp does not say: of a character in several tokens it tells the last alone.
            Incompatible: they are no numbers.
        """
        count = row.sampling.top_logprobs
        told = said.get("completion_probabilities", [])
        if any(one["logprob"] is None for one in told):
            raise not_finite()
        if count is None or said["stop"]:
            return []
        if len(told) != said["tokens_predicted"] - row.made:
            what = "llama.cpp does not say how likely the parts of a character are, and this answer has one in parts"
            raise FieldRefused(what, hint="serve it with --engine transformers", param="logprobs")
        return [
            self._spell.likely(_scored(one), [_scored(other) for other in one["top_logprobs"][:count]], not row.made)
            for one in told
        ]

    def _finish(self, row: LlamaRow, error: Exception | None) -> None:
        with self._changed:
            self._running.discard(row)
            self._changed.notify()
        row.end(error)


def _scored(told: dict[str, Any]) -> tuple[int, float]:
    return told["id"], told["logprob"]


def _tokens(row: LlamaRow) -> int:
    return len(row.ids) + row.limit


def _body(row: LlamaRow, scales: list[dict[str, float]]) -> dict[str, Any]:
    """What ``/completion`` is asked: nothing is left to defaults of its own, which sample.

    llama.cpp chooses a token even by logits that are no numbers. How likely it was shows that, so that is asked for too
    where scales are large.
    """
    asked = row.sampling
    large = any(abs(one["scale"]) >= _LARGE for one in scales)
    count = (1 if large else 0) if asked.top_logprobs is None else max(1, asked.top_logprobs)  # 0 tells nothing at all
    return {
        "prompt": row.ids, "n_predict": row.limit, "lora": scales, "return_tokens": True, "cache_prompt": True,
        "samplers": _ORDER, "temperature": float(asked.temperature or 0), "top_k": asked.top_k or 0,
        "top_p": 1.0 if asked.top_p is None else asked.top_p, "min_p": asked.min_p or 0.0,
        "repeat_penalty": asked.repetition_penalty or 1.0, "repeat_last_n": _tokens(row),
        "seed": row.seed % (2**32 - 1),  # the largest number means: any
        "n_probs": count,
    }  # fmt: skip
