"""What no client should send: the server tells it so, or hangs up, and answers the next one as before."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time

import pytest
from serving import serving

GOOD = json.dumps({"model": "style", "messages": [{"role": "user", "content": "Hi."}], "max_tokens": 4}).encode()
VALUES = [
    None, True, -1, 0, 1e308, 10**400, "", " ", "\x00", "../../etc", "\x1b[2J", "style:1e999", "style@99", [], {},
    [[[]]], {"a": {}}, "x" * 10_000, "style+" * 500, "a:b:c", "%00", "\ud800", "style:nan", "base+base", "style\n",
]  # fmt: skip
FIELDS = ["model", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n", "stop", "stream"]
SPOILT = [b"", b"{", b"nul", b"\xff\xfe", b"[" * 50_000, b'{"a":' * 20_000, b"9" * 10_000, GOOD[:-3], b"{}" * 9]
STALLED = 20


def post(address, body, path="/v1/chat/completions"):
    connection = http.client.HTTPConnection(*address, timeout=60)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def bodies(rng):
    """Broken JSON, and good requests with something wrong in them."""
    yield from SPOILT
    while True:
        asked = json.loads(GOOD)
        for name in rng.sample(FIELDS, rng.choice((1, 1, 2))):
            asked[name] = rng.choice(VALUES)
        if rng.random() < 0.2:
            asked["messages"] = [{"role": rng.choice(["user", "x", 3]), "content": rng.choice(VALUES)}]
        yield json.dumps(asked).encode()


@pytest.fixture
def server(house):
    shelf = house("llama")
    shelf.add("style", seed=1)
    with serving(shelf.folder) as running:
        yield running


def test_hundreds_of_hostile_requests(server):
    before = post(server.address, GOOD)
    assert before[0] == 200
    stalled = []
    for number in range(STALLED):
        held = socket.create_connection(server.address)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(GOOD)}\r\n"
        held.sendall((head + "\r\n{" if number % 2 else head).encode())
        stalled.append(held)
    made = bodies(random.Random(1))
    memory = 0
    for number in range(400):
        body = next(made)
        status, content = post(server.address, body, random.choice(["/v1/chat/completions", "/v1/completions"]))
        assert status in (200, 400, 404, 429), (status, content[:300], body[:300])
        if status != 200:
            assert set(json.loads(content)["error"]) == {"message", "type", "param", "code"}
        if number == 100:
            memory = server.memory()
    for path in ("/../../etc/passwd", "/%00", "/v1/models/%2e%2e%2f", "/v1/models/..", "/" + "a" * 5000):
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        connection.request("GET", path)
        assert connection.getresponse().status in (400, 404)
        connection.close()
    for garbage in (b"\x00" * 100, b"GET / HTTP/9.9\r\n\r\n", b"POST /" + b"a" * 100_000):
        with socket.create_connection(server.address) as connection:
            connection.sendall(garbage)
    for _ in range(20):  # who leaves in mid-stream
        with socket.create_connection(server.address) as connection:
            body = GOOD.replace(b'"max_tokens": 4', b'"max_tokens": 400, "stream": true')
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.recv(200)
    deadline = time.monotonic() + 60
    while (after := post(server.address, GOOD))[0] == 429 and time.monotonic() < deadline:
        time.sleep(0.2)
    text = json.loads(before[1])["choices"]
    assert after[0] == 200 and json.loads(after[1])["choices"] == text
    assert server.memory() - memory < 100_000_000
    assert "Traceback" not in server.errors.read_text()
    for held in stalled:
        held.close()
    assert server.stop() == 0
