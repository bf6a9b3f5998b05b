"""Who may ask: by Host, by Origin, by key, and with how large a body. Plain ASGI, before anything else is done."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import socket
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stackctl.serving.response_body import ApiError

LARGEST_BODY = 32_000_000
"""Bytes."""
_THROWN_AWAY = 8 * LARGEST_BODY
_STALLED = 15.0
"""Seconds without a byte of a body that has begun."""


@dataclass(frozen=True)
class Guard:
    """``host`` is what the server is bound to; ``key`` is wanted of every request to the API, if there is one."""

    host: str
    key: str | None = None

    def check(self, method: str, path: str, headers: Any) -> None:
        """Refuse what another page, another name, or a stranger sends.

        Raises:
            ApiError: 401 or 403.
        """
        host = headers.get("host", "")
        if not self._is_ours(_name_of(host)):
            raise ApiError(403, f"this server is not called '{host[:80]}'", code="foreign_host")
        origin = headers.get("origin")
        if method not in ("GET", "HEAD") and origin is not None and urlsplit_safe(origin) != host.lower():
            raise ApiError(403, f"pages of '{origin[:80]}' may not use this server", code="foreign_origin")
        if self.key is not None and path.startswith("/v1") and not self._has_key(headers.get("authorization", "")):
            raise ApiError(401, "the API key is wrong or missing", code="invalid_api_key")

    def _is_ours(self, name: str) -> bool:
        if name in ("localhost", "127.0.0.1", "::1") or name == self.host.lower():
            return bool(name)
        if is_loopback(self.host):
            return False
        try:
            ipaddress.ip_address(name)
        except ValueError:  # another name may have been made to lead here; an address cannot
            return name in (socket.gethostname().lower(), socket.getfqdn().lower())
        return True

    def _has_key(self, header: str) -> bool:
        """``header`` is what latin-1 makes of its bytes; clients write a key in that, or in UTF-8."""
        scheme, _, given = header.partition(" ")
        known = [(self.key or "").encode()]
        with contextlib.suppress(UnicodeEncodeError):
            known.append((self.key or "").encode("latin-1"))
        sent = given.strip().encode("latin-1", "replace")
        return scheme.lower() == "bearer" and any(hmac.compare_digest(sent, one) for one in known)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name_of(host: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def urlsplit_safe(origin: str) -> str:
    """The host and port of an origin; of ``null``, and of what is none, nothing that a Host could be."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return "?"
    return parts.netloc.lower() if parts.scheme in ("http", "https") and parts.netloc else "?"


async def read_body(request: Any) -> bytes:
    """The body of a request. One that is too large is read all the same, as far as that is bearable, and thrown away:
    most clients send all of it before they look for an answer.

    Raises:
        ApiError: 413 when it is too large, 408 when it stops coming.
    """
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced[:20]) > _THROWN_AWAY:
        raise _too_large()
    body, read = bytearray(), 0
    pieces = request.stream()
    while True:
        try:
            piece = await asyncio.wait_for(anext(pieces), _STALLED)
        except StopAsyncIteration:
            break
        except TimeoutError:
            if read > LARGEST_BODY:
                break
            raise ApiError(408, "the body stopped coming", code="timeout") from None
        read += len(piece)
        if read <= LARGEST_BODY:
            body += piece
        elif read > _THROWN_AWAY:
            break
        else:
            body.clear()
    if read > LARGEST_BODY:
        raise _too_large()
    return bytes(body)


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {LARGEST_BODY // 1_000_000} MB", code="too_large")
