"""What no client should send: the server tells it so, or hangs up, and answers the next one as before."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import time

import pytest
import warm
from hostile_requests import GOOD, assail, hold, post
from serving import serving


@pytest.fixture
def filled_registry(tiny_registry):
    made = tiny_registry("llama")
    made.add("style", seed=1)
    return made


@pytest.fixture
def server(filled_registry):
    with serving(filled_registry.folder) as running:
        yield running


def test_hundreds_of_hostile_requests(server):
    assert sum(assail(server, 300, random.Random(1)).values()) == 300
    assert server.stop() == 0


def test_a_request_that_is_too_large_is_refused_before_it_is_worked_on(server):
    def asked(**fields):
        return json.dumps({**json.loads(GOOD), **fields}).encode()

    turn = {"role": "user", "content": "x"}
    for body, told in (
        (asked(messages=[{"role": "user", "content": "x" * 31_000_000}]), "31,000,000 characters"),
        (asked(messages=[turn] * 2000), "2,000 messages"),
        (b"[" + b"[]," * 10_000_000 + b"[]]", "1,000,000 lists"),
        (asked(prompt=["Hi."] * 16, n=16), "256 answers"),
    ):
        path = "/v1/chat/completions"
        if b"prompt" in body:
            given = json.loads(body)
            del given["messages"]
            body, path = json.dumps(given).encode(), "/v1/completions"
        started = time.monotonic()
        status, content = post(server, body, path)
        assert status == 400 and told in json.loads(content)["error"]["message"], content[:300]
        assert time.monotonic() - started < 20
    assert server.memory() < 2_000_000_000


def test_connections_that_stall_are_hung_up_on(filled_registry):
    with serving(filled_registry.folder, start=_impatient) as server:
        held = hold(server, 30)
        assert post(server, GOOD)[0] == 200
        for number, connection in enumerate(held):
            connection.settimeout(60)
            answer = connection.recv(1000)
            assert answer.startswith(b"HTTP/1.1 408 ") if number % 3 == 2 else answer == b""
            connection.close()


def test_a_client_that_does_not_read_is_dropped_and_its_places_are_free(filled_registry):
    """Sixteen endless answers, which fill every buffer on the way and every place in the batch."""
    body = json.dumps({**json.loads(GOOD), "stream": True, "n": 16, "max_tokens": 450, "logprobs": True,
                       "top_logprobs": 20, "temperature": 1.0, "seed": 1}).encode()  # fmt: skip
    with serving(filled_registry.folder, start=_impatient) as server:
        before = post(server, GOOD)
        memory = server.memory()
        stalled = [_unread(server, body) for _ in range(3)]
        assert stalled[0].recv(12) == b"HTTP/1.1 200"
        deadline = time.monotonic() + 120
        while server.errors.read_text().count(" tokens  ") < 4 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert server.errors.read_text().count(" tokens  ") == 4, "each of the three was given up"
        started = time.monotonic()
        after = post(server, GOOD)
        assert after[0] == 200 and time.monotonic() - started < 20, "nobody waits in its place"
        assert json.loads(after[1])["choices"] == json.loads(before[1])["choices"]
        assert server.memory() - memory < 300_000_000
        assert not any(_whole(connection) for connection in stalled)
        assert server.stop() == 0
        assert "Traceback" not in server.errors.read_text()


def _impatient(arguments, folder, out, errors, **environment):
    """The command with seconds for a client to send or to read where it has up to a minute."""
    place = folder / "impatience"
    place.mkdir(exist_ok=True)
    (place / "sitecustomize.py").write_text(
        "from stackctl.serving import guard, http_server as server\n"
        "server._HEAD = guard._STALLED = 4.0\nserver._UNREAD = 2.0\n"
    )
    return warm.Command(arguments, folder, out, errors, **environment, PYTHONPATH=str(place))


def _unread(server, body):
    """A request whose answer nobody reads, with a small buffer at this end."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(server.address)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n\r\n"
    connection.sendall(head % len(body) + body)
    return connection


def _whole(connection):
    """Whether what is left of an answer goes to its end; what lay in buffers when it was dropped does not."""
    received = b""
    connection.settimeout(30)
    with contextlib.closing(connection), contextlib.suppress(ConnectionError):
        while piece := connection.recv(1 << 20):
            received = received[-100:] + piece
    return b"[DONE]" in received
