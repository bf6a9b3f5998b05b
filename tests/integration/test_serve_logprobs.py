"""``logprobs`` as OpenAI's own client reads them, against the log-softmax of raw PEFT's forward pass."""

from __future__ import annotations

import json
from types import SimpleNamespace

import oracle
import pytest
import torch
from serving import serving

TEXT = "Tell me of the sea."
NEAR = 1e-4


@pytest.fixture
def filled_registry(tiny_registry):
    made = tiny_registry("llama")
    made.add("style", seed=1)
    made.add("tone", seed=2, r=3)
    made.run("compose", "style+tone", "--method", "ties", "--name", "mixed")
    return made


@pytest.fixture
def server(filled_registry):
    with serving(filled_registry.folder) as running:
        yield running


def token_ids():
    """The token of each byte, and of each special token's text."""
    from tokenizers import pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    found = {bytes([byte]): order.index(letter) for byte, letter in bytes_to_unicode().items()}
    return {**found, b"<|im_start|>": oracle.START, b"<|im_end|>": oracle.END}


IDS = token_ids()


def expected(model, prompt, made, top):
    """Of tokens after a prompt: the log-probability of each, and those of the ``top`` likeliest, in float64."""
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([[*prompt, *made]])).logits[0, len(prompt) - 1 : -1].double()
    logprobs = rows.log_softmax(-1)
    likeliest = logprobs.topk(top).values if top else logprobs[:, :0]
    return [float(row[token]) for row, token in zip(logprobs, made, strict=True)], likeliest.tolist(), logprobs


def check_chat(tokens, model, prompt, top):
    """Every number of a chat's tokens."""
    made = [IDS[bytes(one.bytes)] for one in tokens]
    chosen, likeliest, logprobs = expected(model, prompt, made, top)
    assert [one.logprob for one in tokens] == pytest.approx(chosen, abs=NEAR)
    for place, (one, values) in enumerate(zip(tokens, likeliest, strict=True)):
        assert [other.logprob for other in one.top_logprobs] == pytest.approx(values, abs=NEAR)
        for other in one.top_logprobs:
            wanted = float(logprobs[place, IDS[bytes(other.bytes)]])
            assert other.logprob == pytest.approx(wanted, abs=NEAR)
        for named in (one, *one.top_logprobs):
            text = bytes(named.bytes)
            assert named.token == (text.decode() if text.isascii() else f"\\x{text[0]:02x}")
    return made


def chat_ids(text):
    return [
        oracle.START, *oracle.byte_ids(f"user\n{text}"), oracle.END, *oracle.byte_ids("\n"),
        oracle.START, *oracle.byte_ids("assistant\n"),
    ]  # fmt: skip


def ask(client, model, **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": TEXT}], **options)


def pieces(chunks):
    """A stream as one choice; every chunk with text has the tokens of it."""
    text, tokens = "", []
    for chunk in chunks:
        choice = chunk.choices[0]
        if choice.delta.content:
            assert choice.logprobs and choice.logprobs.content
        text += choice.delta.content or ""
        tokens += choice.logprobs.content if choice.logprobs else []
    return SimpleNamespace(text=text, tokens=tokens)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
def test_chat_whole_and_streamed(server, filled_registry, options):
    client, prompt = server.client(), chat_ids(TEXT)
    model = oracle.live(filled_registry.base, *filled_registry.members(("style", 1.0), ("tone", 0.5)))
    told = {"logprobs": True, "top_logprobs": 5, "max_tokens": 24, **options}
    answer = ask(client, "style+tone:0.5", **told)
    [choice] = answer.choices
    assert choice.logprobs.refusal is None and len(choice.logprobs.content) == answer.usage.completion_tokens
    made = check_chat(choice.logprobs.content, model, prompt, 5)
    joined = b"".join(bytes(one.bytes) for one in choice.logprobs.content)
    assert joined.decode(errors="replace") == choice.message.content
    if not options:
        assert all(one.top_logprobs[0].bytes == one.bytes for one in choice.logprobs.content), "the likeliest"
    streamed = pieces(ask(client, "style+tone:0.5", stream=True, **told))
    assert streamed.text == choice.message.content
    assert check_chat(streamed.tokens, model, prompt, 5) == made
    assert ask(client, "style+tone:0.5", max_tokens=24, **options).choices[0].message.content == streamed.text


def test_none_twenty_and_a_stack_that_is_folded(server, filled_registry):
    client, prompt = server.client(), chat_ids(TEXT)
    model = oracle.live(filled_registry.base, *filled_registry.members(("style", 1.0)))
    for top in (0, 20):
        [choice] = ask(client, "style", logprobs=True, top_logprobs=top, max_tokens=6).choices
        assert all(len(one.top_logprobs) == top for one in choice.logprobs.content)
        check_chat(choice.logprobs.content, model, prompt, top)
    assert ask(client, "style", max_tokens=2).choices[0].logprobs is None
    assert ask(client, "style", max_tokens=2, logprobs=False).choices[0].logprobs is None
    filled_registry.run("export", "mixed", "--format", "model", "--out", "folded")
    folded = oracle.load_plain(filled_registry.folder / "folded", torch.float64)
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        [choice] = ask(client, "mixed", logprobs=True, top_logprobs=3, max_tokens=12, **options).choices
        made = check_chat(choice.logprobs.content, folded, prompt, 3)
        streamed = pieces(ask(client, "mixed", logprobs=True, top_logprobs=3, max_tokens=12, stream=True, **options))
        assert check_chat(streamed.tokens, folded, prompt, 3) == made


def test_completions_in_the_older_shape(server, filled_registry):
    client, prompt = server.client(), oracle.byte_ids(TEXT)
    model = oracle.live(filled_registry.base, *filled_registry.members(("style", 1.0)))
    options = {"model": "style", "prompt": [TEXT, "Hi."], "logprobs": 3, "max_tokens": 24, "temperature": 1, "seed": 2}
    choice = client.completions.create(**options).choices[0]
    found = choice.logprobs
    made = [IDS[name_bytes(name)] for name in found.tokens]
    chosen, likeliest, logprobs = expected(model, prompt, made, 3)
    assert found.token_logprobs == pytest.approx(chosen, abs=NEAR)
    for place, (top, values) in enumerate(zip(found.top_logprobs, likeliest, strict=True)):
        assert found.tokens[place] in top and 3 <= len(top) <= 4
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(values, abs=NEAR)
        for name, value in top.items():
            assert value == pytest.approx(float(logprobs[place, IDS[name_bytes(name)]]), abs=NEAR)
    for name, start in zip(found.tokens, found.text_offset, strict=True):
        if not name.startswith(("bytes:", "<|im_")):  # parts of characters, and what has no text
            assert choice.text[start : start + len(name)] == name
    assert found.text_offset == sorted(found.text_offset) and found.text_offset[0] == 0
    streamed = [c.choices[0] for c in client.completions.create(**options, stream=True) if c.choices[0].index == 0]

    def of_stream(key):
        return [value for c in streamed if c.logprobs for value in getattr(c.logprobs, key)]

    for key in ("tokens", "text_offset"):
        assert of_stream(key) == getattr(found, key)
    assert of_stream("token_logprobs") == pytest.approx(found.token_logprobs, abs=NEAR)  # rows round by their company
    for top, again in zip(found.top_logprobs, of_stream("top_logprobs"), strict=True):
        assert again == pytest.approx(top, abs=NEAR)
    alone = client.completions.create(model="style", prompt=TEXT, logprobs=0, max_tokens=3).choices[0].logprobs
    assert [list(top) for top in alone.top_logprobs] == [[name] for name in alone.tokens]


def name_bytes(name):
    if name.startswith("bytes:"):
        return bytes(int(part, 16) for part in name.removeprefix("bytes:").split("\\x")[1:])
    return name.encode()


def test_a_text_that_ends_the_answer_takes_its_tokens_along(server):
    client = server.client()
    text = ask(client, "style", max_tokens=24).choices[0].message.content
    stop = next(text[at : at + 2] for at in range(6, len(text)) if text[at : at + 2].isascii())
    for stream in (False, True):
        answer = ask(client, "style", max_tokens=24, stop=stop, logprobs=True, stream=stream)
        if stream:
            found = pieces(answer)
        else:
            found = SimpleNamespace(text=answer.choices[0].message.content, tokens=answer.choices[0].logprobs.content)
        assert found.text == text[: text.index(stop)]
        assert b"".join(bytes(one.bytes) for one in found.tokens).decode(errors="replace") == found.text


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("chat/completions", {"logprobs": 3}, "logprobs"),
        ("chat/completions", {"logprobs": "true"}, "logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ("chat/completions", {"logprobs": True, "top_logprobs": True}, "top_logprobs"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs"),
        ("chat/completions", {"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ("completions", {"logprobs": True}, "logprobs"),
        ("completions", {"logprobs": 21}, "logprobs"),
        ("completions", {"logprobs": 1.0}, "logprobs"),
        ("completions", {"top_logprobs": 2}, "top_logprobs"),
    ],
)
def test_what_is_wrong_names_the_field(path, fields, param):
    from stackctl.serving.request_body import parse_body
    from stackctl.serving.response_body import ApiError

    chat = path.startswith("chat")
    asked = {"messages": [{"role": "user", "content": TEXT}]} if chat else {"prompt": TEXT}
    with pytest.raises(ApiError) as refused:
        parse_body(json.dumps({"model": "style", **asked, **fields}).encode(), chat=chat)
    assert (refused.value.status, refused.value.param) == (400, param)
