"""OpenAI's own client, five expressions at once, on the real model: it gets what ``generate`` writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from serving import serving

STACKS = ["base", "style", "storyteller", "style:0.5+instruct", "style:-0.5+instruct@1:1.5"]
ASKED = "Tell me about the sea."


def test_five_expressions_at_once_stream_what_generate_writes(path, monkeypatch):
    known = {name: path.json("generate", name, "-p", ASKED, "--max-new-tokens", 24)["text"] for name in STACKS}
    assert len(set(known.values())) > 2
    monkeypatch.setenv("HOME", str(path.home))
    with serving(path.folder) as server:
        client = server.client()

        def streamed(name):
            chunks = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": ASKED}], max_tokens=24, stream=True
            )
            return name, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(len(STACKS)) as pool:
            assert dict(pool.map(streamed, STACKS)) == known
        assert server.stop() == 0
