"""Run the server until it is told to stop; then what is being written is finished."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from stackctl.core.errors import Failed
from stackctl.machine.processes import on_signals

_HEAD = 15.0
"""Seconds from a connection's first byte, or its beginning, until a request's head has come."""
_UNREAD = 60.0
"""Seconds that a client may leave its answer unread, with every buffer on the way full."""
_FINISHING = 120
"""Seconds that answers have to end in once the server was told to stop."""


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 without its endless patience: it waits for ever for a request's first lines, and for a client
    to read its answer.
    """

    _head: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._was_read()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(_UNREAD, self.transport.abort)  # to close it would wait for what is unread

    def resume_writing(self) -> None:
        self._was_read()
        super().resume_writing()

    def _was_read(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _expect(self) -> None:
        """Give what has begun its time; a request whose head is there waits for nothing more here."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._head is None and not self.transport.is_closing():
            self._head = self.loop.call_later(_HEAD, self._hang_up)

    def _forget(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _hang_up(self) -> None:
        self._head = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without its habit of raising the signal again that ended it, which would be no exit 0."""

    ready: Callable[[], None] = staticmethod(lambda: None)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return on_signals(self.handle_exit)


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound; port 0 takes a free one.

    Raises:
        Failed: the address cannot be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.set_inheritable(True)
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        hint = "name an address of this machine: --host 127.0.0.1"
        if number in (errno.EADDRINUSE, errno.EACCES):  # taken, or for the system alone
            hint = "--port 0 takes a free one"
        why = getattr(error, "strerror", None) or error
        raise Failed(f"cannot listen on {host} port {port}: {why}", hint=hint) from error
    return made


def run(app: Any, bound: socket.socket, ready: Callable[[], None]) -> None:
    """Serve on a socket; ``ready`` is called once it answers. Returns after SIGINT or SIGTERM."""
    config = uvicorn.Config(
        app, log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=_FINISHING,
        server_header=False, timeout_keep_alive=30, ws="none", proxy_headers=False, http=_Protocol,
    )  # fmt: skip
    server = _Server(config)
    server.ready = ready
    server.run(sockets=[bound])
