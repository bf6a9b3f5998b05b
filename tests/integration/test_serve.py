"""``stackctl serve`` as OpenAI's own client sees it, on a real socket."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import warm
from serving import serving

TEXT = "Tell me of the sea."
STACKS = ["base", "style", "tone:0.5", "style+tone", "style:-1+tone@1:2"]


@pytest.fixture
def filled_registry(tiny_registry):
    made = tiny_registry("llama")
    made.add("style", seed=1)
    made.add("tone", seed=2, r=3)
    made.run("compose", "style+tone")
    return made


@pytest.fixture
def server(filled_registry):
    with serving(filled_registry.folder) as running:
        yield running


def chat(client, model, text=TEXT, **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def streamed(client, model, **options):
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    return text, chunks[-2].choices[0].finish_reason, chunks[-1].usage


def generated(run, model, *options):
    return run("generate", model, "-p", TEXT, *options, "--json").json


def raw(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(*server.address, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, content
    finally:
        connection.close()


def error(server, status, body, path="/v1/chat/completions", **headers):
    """The error object that a request is answered with."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    found, content = raw(server, "POST", path, sent, **headers)
    assert found == status, content
    told = json.loads(content)["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return told


def asking(**fields):
    return {"model": "style", "messages": [{"role": "user", "content": TEXT}], "max_tokens": 3, **fields}


def test_five_stacks_at_once_write_what_generate_writes(server, run):
    assert server.ready["base"] == "tiny" and server.ready["engine"] == "transformers"
    assert server.ready["models"][:1] == ["base"] and {"style", "tone", "style+tone"} <= set(server.ready["models"])
    known = {name: generated(run, name, "--max-new-tokens", 24) for name in STACKS}
    client = server.client()
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: (name, streamed(client, name, max_tokens=24)), STACKS * 4))
    for name, (text, reason, usage) in found:
        assert text == known[name]["text"]
        assert reason == ("length" if known[name]["stop"] == "length" else "stop")
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            known[name]["prompt_tokens"], known[name]["new_tokens"],
        )  # fmt: skip
    whole = chat(client, "style", max_completion_tokens=24)
    assert whole.choices[0].message.content == known["style"]["text"]
    assert "style  " in server.errors.read_text(), "a line on each request"


def test_completions_models_and_health(server, run):
    client = server.client()
    known = run("generate", "style", "-p", TEXT, "--raw", "--max-new-tokens", 10, "--json").json
    found = client.completions.create(model="style", prompt=TEXT, max_tokens=10)
    assert found.choices[0].text == known["text"] and found.usage.prompt_tokens == known["prompt_tokens"]
    pieces = list(client.completions.create(model="style", prompt=[TEXT, "Hi."], max_tokens=10, stream=True))
    assert "".join(p.choices[0].text for p in pieces if p.choices[0].index == 0) == known["text"]
    assert {p.choices[0].index for p in pieces} == {0, 1}
    assert "style+tone" in [model.id for model in client.models.list()]
    assert client.models.retrieve("style:0.5+tone").id == "style:0.5+tone"
    listed = {row["id"]: row for row in json.loads(raw(server, "GET", "/v1/models")[1])["data"]}
    assert {row["kind"] for row in listed.values()} == {"base", "adapter", "stack"}
    assert [name for name, row in listed.items() if row["current"]] == ["style+tone"]
    for name, row in listed.items():
        assert json.loads(raw(server, "GET", f"/v1/models/{name}")[1]) == row
    typed = json.loads(raw(server, "GET", "/v1/models/style:0.5+tone")[1])
    assert (typed["kind"], typed["current"], typed["expression"]) == ("expression", False, "style@1:0.5+tone@1")
    assert json.loads(raw(server, "GET", "/health")[1])["status"] == "ok"


def test_sampling_stop_and_several_choices(server, run):
    client = server.client()
    drawn = generated(run, "style", "--max-new-tokens", 12, "--temperature", 0.9, "--top-p", 0.8, "--seed", 7)
    options = {"max_tokens": 12, "temperature": 0.9, "top_p": 0.8, "seed": 7, "n": 3}
    choices = chat(client, "style", **options).choices
    assert choices[0].message.content == drawn["text"]
    assert len({choice.message.content for choice in choices}) == 3
    assert [c.message.content for c in chat(client, "style", **options).choices] == [c.message.content for c in choices]
    text = generated(run, "style", "--max-new-tokens", 12)["text"]
    stop = text[4:6]
    stopped = chat(client, "style", max_tokens=12, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_what_is_wrong_is_told_in_openais_words(server, filled_registry):
    client = server.client()
    with pytest.raises(openai.NotFoundError, match="did you mean 'style'"):
        chat(client, "stile")
    with pytest.raises(openai.NotFoundError):
        chat(client, "Org/Some-Model")
    for model in ("style+style", "style:x", "style+", "", "style+base"):
        assert error(server, 400, asking(model=model))["message"]
    long = [{"role": "user", "content": "sea " * 600}]
    assert "512" in error(server, 400, asking(messages=long))["message"]
    assert error(server, 400, b"{not json")["code"] == "invalid_json"
    assert error(server, 400, b"[1]")["code"] == "invalid_json"
    assert error(server, 400, b"[" * 100_000)["code"] == "invalid_json"
    assert error(server, 400, b'{"model": NaN}')["code"] == "invalid_json"
    assert error(server, 413, b" " * 33_000_000)["code"] == "too_large"
    wrong = {
        "model": 3, "messages": "hi", "max_tokens": "many", "temperature": True, "top_p": 2, "top_k": 1.5, "seed": "x",
        "n": 0, "stop": [""], "stream": 1, "stream_options": {"include_usage": True}, "min_p": -1, "logprobs": 3,
        "tools": [{}], "max_completion_tokens": 0, "temprature": 1,
    }  # fmt: skip
    for logprobs in (True, False):
        huge = asking(model="style:1e300", logprobs=logprobs)
        assert "not a finite number" in error(server, 400, huge)["message"]
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(chat, server.client(), name, max_tokens=12) for name in ("style", "style:1e300") * 2]
        assert [one.exception() is None for one in asked] == [True, False] * 2, "no row ends another"
    coldest, greedy = (chat(client, "style", max_tokens=8, **options) for options in ({"temperature": 1e-300}, {}))
    assert coldest.choices[0].message.content == greedy.choices[0].message.content
    unread = {"include_usage": True, "usage": True}
    assert error(server, 400, asking(stream=True, stream_options=unread))["param"] == "stream_options"
    for name, value in wrong.items():
        assert error(server, 400, asking(**{name: value}))["param"] is not None, name
    for messages in ([], [3], [{"role": "user"}], [{"role": "x", "content": "a"}], [{"role": "user", "content": " "}]):
        error(server, 400, asking(messages=messages))
    error(server, 400, {"model": "style", "prompt": [1, 2]}, path="/v1/completions")
    error(server, 404, {}, path="/v1/nothing")
    assert raw(server, "GET", "/v1/chat/completions")[0] == 405
    assert chat(client, "style", max_tokens=3).choices, "it answers as before"


def test_other_pages_and_strangers_are_refused(filled_registry):
    with serving(filled_registry.folder, "--api-key", "secret") as server:
        host, port = server.address
        key = {"Authorization": "Bearer secret"}
        assert error(server, 401, asking())["code"] == "invalid_api_key"
        assert error(server, 401, asking(), Authorization="Bearer sécret".encode().decode("latin-1"))
        assert chat(server.client("secret"), "style", max_tokens=2).choices
        with pytest.raises(openai.AuthenticationError):
            chat(server.client("wrong"), "style")
        for foreign in ("evil.example", f"evil.example:{port}", "10.1.2.3", ""):
            assert error(server, 403, asking(), Host=foreign, **key)["code"] == "foreign_host"
        assert raw(server, "GET", "/", Host="evil.example")[0] == 403
        for origin in ("http://evil.example", "null", f"http://{host}:{port + 1}", "http://[", "x"):
            assert error(server, 403, asking(), Origin=origin, **key)["code"] == "foreign_origin"
        own = raw(server, "POST", "/v1/chat/completions", json.dumps(asking()), Origin=f"http://{host}:{port}", **key)
        assert own[0] == 200
        assert server.stop(signal.SIGTERM) == 0


def test_the_registry_may_change_while_it_runs(server, filled_registry):
    client = server.client()
    with pytest.raises(openai.NotFoundError):
        chat(client, "late", max_tokens=2)
    filled_registry.add("late", seed=9)
    assert chat(client, "late", max_tokens=2).choices
    running = chat(client, "late", stream=True, max_tokens=200)
    next(iter(running))
    filled_registry.run("rm", "late")
    assert list(running)[-1].choices[0].finish_reason in ("stop", "length")  # what is running ends well
    with pytest.raises(openai.NotFoundError):
        chat(client, "late", max_tokens=2)
    weights = filled_registry.weights("tone") / "adapter_model.safetensors"
    kept = weights.with_suffix(".kept")
    shutil.copy2(weights, kept)
    weights.chmod(0o644)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(openai.BadRequestError, match="tone@1"):
        chat(client, "style+tone:0.3", max_tokens=2)
    entry = filled_registry.folder / "registry" / "adapters" / "style.yaml"
    before = entry.read_text()
    entry.write_text("<<<<<<< HEAD\n" + before)
    with pytest.raises(
        openai.InternalServerError, match="unresolved merge conflict"
    ):  # not that there is no such model
        chat(client, "style", max_tokens=2)
    entry.write_text(before)
    assert chat(client, "style", max_tokens=2).choices


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_finishes_what_is_being_written_and_ends_with_0(server, number):
    stream = chat(server.client(), "style", stream=True, max_tokens=300)
    next(iter(stream))
    server.process.send_signal(number)
    chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")
    assert server.process.wait(60) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_that_is_ended_while_it_starts_says_so_and_leaves_nothing(filled_registry, tmp_path, number, code):
    """SIGTERM ended it without a word; once it answers, both end it with 0."""
    before = set(filled_registry.folder.rglob("*"))
    place = tmp_path / "place"
    place.mkdir()
    (place / "sitecustomize.py").write_text(
        "import os, time\n"
        "from stackctl.serving import http_server\n"
        f"http_server.listen = lambda *_: (os.kill(os.getpid(), {int(number)}), time.sleep(60))\n"
    )
    out, errors = place / "out", place / "errors"
    arguments = ["serve", "--port", "0", "--json"]
    command = warm.Command(arguments, filled_registry.folder, out, errors, PYTHONPATH=str(place))
    assert command.wait(60) == code
    assert json.loads(out.read_text())["error"]["code"] == "interrupted"
    assert errors.read_text().count("\n") == 2
    assert {path for path in filled_registry.folder.rglob("*") if place not in (path, *path.parents)} == before


def test_a_taken_port_and_a_missing_name_are_refused(filled_registry, fails):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = fails("serve", "--port", taken.getsockname()[1], code=1)
        assert "cannot listen" in said and "Errno" not in said and "--port 0" in said
    for host in ("no.such.host.invalid", "192.0.2.1"):
        assert "name an address of this machine" in fails("serve", "--host", host, "--port", 0, code=1)
    fails("serve", "stile", code=3)
