"""What no client should send to ``stackctl serve``, and a look whether it answers as before and did not grow."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator

from serving import Server

GOOD = json.dumps({"model": "style", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}).encode()
VALUES = [
    None, True, -1, 0, 1e308, 10**400, "", " ", "\x00", "../../etc", "\x1b[2J", "style:1e999", "style@99", [], {},
    [[[]]], {"a": {}}, "x" * 10_000, "style+" * 500, "a:b:c", "%00", "\ud800", "style:nan", "base+base", "style\n",
]  # fmt: skip
FIELDS = ["model", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stream"]
SPOILT = [b"", b"{", b"nul", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000, b"9" * 10_000, GOOD[:-3], b"{}" * 9]
PATHS = ["/../../etc/passwd", "/%00", "/v1/models/%2e%2e%2f", "/v1/models/..", "/" + "a" * 5000, "/v1/models/%1b%5b"]
GARBAGE = [b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /" + b"a" * 100_000, b"\r\n" * 500]
HELD = 20
_GROWTH = 100_000_000
"""Bytes that the process may hold more at the end than after the first quarter."""


def post(server: Server, body: bytes, path: str = "/v1/chat/completions") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def _bodies(chance: random.Random) -> Iterator[bytes]:
    """Broken JSON, and good requests with something wrong in them."""
    yield from SPOILT
    while True:
        asked = json.loads(GOOD)
        for name in chance.sample(FIELDS, chance.choice((1, 1, 2))):
            asked[name] = chance.choice(VALUES)
        if chance.random() < 0.2:
            asked["messages"] = [{"role": chance.choice(["user", "x", 3]), "content": chance.choice(VALUES)}]
        yield json.dumps(asked).encode()


def _head(body: bytes, more: bytes = b"") -> bytes:
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n" % len(body) + more


def hold(server: Server, count: int) -> list[socket.socket]:
    """Connections that stall: before a byte, within the head, and within the body."""
    held = []
    for number in range(count):
        held.append(socket.create_connection(server.address))
        held[-1].sendall([b"", _head(GOOD), _head(GOOD, b"\r\n{")][number % 3])
    return held


def assail(server: Server, count: int, chance: random.Random, goes_on: Callable[[], bool] = lambda: True) -> Counter:
    """Send ``count`` hostile requests; how many of each kind there were.

    Raises:
        AssertionError: one was answered with something else than an error object or an answer, the server does not
            answer as before, or it grew.
    """
    kept, sent, memory = post(server, GOOD), Counter[str](), 0
    assert kept[0] == 200
    held = hold(server, HELD)
    bodies = _bodies(chance)
    for number in range(count):
        if not goes_on():
            break
        if number == count // 4:
            memory = server.memory()
        kind = chance.choices(["body", "path", "garbage", "leaves"], [20, 1, 1, 2])[0]
        sent[kind] += 1
        if kind == "body":
            body = next(bodies)
            status, content = post(server, body, chance.choice(["/v1/chat/completions", "/v1/completions"]))
            assert status in (200, 400, 404, 429), (status, content[:300], body[:300])
            assert status == 200 or set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
        elif kind == "path":
            connection = http.client.HTTPConnection(*server.address, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", chance.choice(PATHS))
                assert connection.getresponse().status in (400, 404)
        else:
            with socket.create_connection(server.address) as connection:
                if kind == "garbage":
                    with contextlib.suppress(ConnectionError):
                        connection.sendall(chance.choice(GARBAGE))
                else:  # in mid-stream
                    body = GOOD.replace(b'"max_tokens": 4', b'"max_tokens": 400, "stream": true')
                    connection.sendall(_head(body, b"\r\n") + body)
                    connection.recv(chance.choice((1, 200, 2000)))
    deadline = time.monotonic() + 60
    while (after := post(server, GOOD))[0] == 429 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert after[0] == 200 and json.loads(after[1])["choices"] == json.loads(kept[1])["choices"]
    assert not memory or server.memory() - memory < _GROWTH
    assert "Traceback" not in server.errors.read_text()
    for connection in held:
        connection.close()
    return sent
