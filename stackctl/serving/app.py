"""The server's addresses: OpenAI's API, and the page. Imported only by ``serve``, for it needs the extra."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from stackctl.core import Say
from stackctl.core.errors import NotFound, StackctlError
from stackctl.serving.guard import Guard, read_body
from stackctl.serving.model_names import ModelNames
from stackctl.serving.request_body import CompletionRequest, parse_body
from stackctl.serving.response_body import DONE, ApiError, Choice, Completion, api_error, event

if TYPE_CHECKING:
    from stackctl.engine.generation.logprobs import TokenLogprob
    from stackctl.engine.serving.requests import Engine, Row

_LOOK = 0.5
"""Seconds between looks whether who asked is still there."""
_PAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"


@dataclass(frozen=True)
class Service:
    """What answers: the engine, the models it may be asked for, who may ask, and where a line on each request goes."""

    engine: Engine[Any]
    models: ModelNames
    guard: Guard
    say: Say
    debug: bool = False

    def prepare(self, asked: CompletionRequest) -> list[Row]:
        """The rows of a request.

        Raises:
            StackctlError: the model or a prompt cannot be had.
        """
        from stackctl.engine.records.prompt_files import Prompt

        _, plan = self.models.find(asked.model)
        prompts = [Prompt(text) for text in asked.prompts]
        if asked.messages:
            prompts = [Prompt(asked.messages[-1]["content"], [dict(m) for m in asked.messages])]  # type: ignore[misc]
        try:
            return self.engine.prepare(plan, prompts, asked.sampling, copies=asked.n, streams=asked.stream)
        except NotFound as error:
            raise ApiError(500, error.message) from error


@dataclass(frozen=True)
class _Piece:
    """More of an answer, by its number: text and how likely its tokens were; its end, where ``text`` is None."""

    index: int
    text: str | None
    logprobs: Sequence[TokenLogprob]
    error: Exception | None = None


class PendingRows:
    """What the rows of one request say, brought from the engine's thread to the event loop."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.events: asyncio.Queue[_Piece] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def tell(index: int, row: Row, text: str | None, error: Exception | None = None) -> None:
            delta = _Piece(index, text, row.answer.next_logprobs(), error)
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.events.put_nowait, delta)

        def end(index: int, row: Row, error: Exception | None) -> None:
            tell(index, row, None, error)

        for index, row in enumerate(rows):
            row.on_text = partial(tell, index, row)
            row.on_end = partial(end, index)

    def cancel(self) -> None:
        for row in self.rows:
            row.cancelled.set()

    def usage(self, copies: int) -> dict[str, int]:
        """Tokens read, each prompt once, and tokens written."""
        read = sum(len(row.ids) for row in self.rows[::copies])
        made = sum(row.new_tokens for row in self.rows)
        return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class App:
    """The ASGI application: who may ask is looked at first, and every error is told in the API's own shape."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._routed = Starlette(
            routes=[
                Route("/", self.page, methods=["GET"]),
                Route("/health", self.health, methods=["GET"]),
                Route("/v1/models", self.models, methods=["GET"]),
                Route("/v1/models/{name:path}", self.model, methods=["GET"]),
                Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
                Route("/v1/completions", self.completions, methods=["POST"]),
            ]
        )
        # Starlette's own handler of errors would send them as text; ours answers all of them alike.
        for kind in (HTTPException, ApiError, StackctlError, ClientDisconnect, Exception):
            self._routed.add_exception_handler(kind, self._tell)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._routed(scope, receive, send)
            return
        request, begun = Request(scope, receive), False

        async def sending(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self.service.guard.check(scope["method"], scope["path"], request.headers)
            await self._routed(scope, receive, sending)
        except Exception as error:
            if begun:
                raise
            await (await self._tell(request, error))(scope, receive, send)

    async def _tell(self, request: Request, error: Exception) -> Response:
        """An error as an answer."""
        if isinstance(error, ClientDisconnect):
            return Response(status_code=499)
        headers = None
        if isinstance(error, HTTPException):
            headers = error.headers
            error = ApiError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}")
        answer = api_error(error)
        if answer.status >= 500:
            self.service.say(f"error: {type(error).__name__}: {error}")
        return JSONResponse(answer.json(), answer.status, headers=headers or answer.headers)

    async def page(self, request: Request) -> Response:
        text = (resources.files("stackctl.serving") / "mixing_desk.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Frame-Options": "DENY"})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "base": self.service.models.base.name})

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": await run_in_threadpool(self.service.models.listed)})

    async def model(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(self.service.models.described, request.path_params["name"]))

    async def chat_completions(self, request: Request) -> Response:
        return await self._complete(request, chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, chat=False)

    async def _complete(self, request: Request, *, chat: bool) -> Response:
        started = time.perf_counter()
        asked = parse_body(await read_body(request), chat=chat)
        rows = await run_in_threadpool(self.service.prepare, asked)
        pending = PendingRows(rows)
        self.service.engine.submit(rows)
        completion = Completion(asked.model, chat, asked.sampling.top_logprobs)

        def done() -> None:
            pending.cancel()
            used, seconds = pending.usage(asked.n), time.perf_counter() - started
            tokens = f"{used['prompt_tokens']} + {used['completion_tokens']} tokens"
            self.service.say(f"{asked.model}  {tokens}  {seconds:.2f} s")

        if asked.stream:
            return _Streamed(_stream(pending, completion, asked), done)
        try:
            answers = await _whole(pending, request)
        finally:
            done()
        if answers is None:
            return Response(status_code=499)
        return JSONResponse(completion.whole(answers, pending.usage(asked.n)))


async def _whole(pending: PendingRows, request: Request) -> list[Choice] | None:
    """The answers of a request once all of them are there; None when nobody waits for them any more."""
    left = len(pending.rows)
    logprobs: list[list[TokenLogprob]] = [[] for _ in pending.rows]
    while left:
        try:
            delta = await asyncio.wait_for(pending.events.get(), _LOOK)
        except TimeoutError:
            if await request.is_disconnected():
                return None
            continue
        if delta.error is not None:
            raise delta.error
        logprobs[delta.index] += delta.logprobs
        left -= delta.text is None
    return [Choice(row.text, row.stop, own) for row, own in zip(pending.rows, logprobs, strict=True)]


class _Streamed(StreamingResponse):
    """Server-sent events. ``done`` is called when they end, however that is: a generator that nobody asks any more ends
    when it is collected, which may be minutes later.
    """

    def __init__(self, events: AsyncIterator[bytes], done: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _stream(pending: PendingRows, completion: Completion, asked: CompletionRequest) -> AsyncIterator[bytes]:
    """The answers as server-sent events."""
    for index in range(len(pending.rows)):
        if first := completion.begin(index):
            yield first
    left = len(pending.rows)
    while left:
        delta = await pending.events.get()
        if delta.error is not None:
            yield event(api_error(delta.error).json())
            return
        if delta.text is None:
            left -= 1
            yield completion.end(delta.index, pending.rows[delta.index].stop, delta.logprobs)
        elif delta.text:
            yield completion.piece(delta.index, delta.text, delta.logprobs)
    if asked.include_usage:
        yield completion.usage(pending.usage(asked.n))
    yield DONE
