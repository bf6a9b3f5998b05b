"""What no client should send: the server tells it so, or hangs up, and answers the next one as before."""

from __future__ import annotations

import json
import random
import time

import pytest
from hostile_requests import GOOD, assail, hold, post
from serving import serving


@pytest.fixture
def server(house):
    shelf = house("llama")
    shelf.add("style", seed=1)
    with serving(shelf.folder) as running:
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


def test_connections_that_stall_are_hung_up_on(server):
    held = hold(server, 30)
    assert post(server, GOOD)[0] == 200
    for number, connection in enumerate(held):
        connection.settimeout(60)
        answer = connection.recv(1000)
        assert answer.startswith(b"HTTP/1.1 408 ") if number % 3 == 2 else answer == b""
        connection.close()
