"""Turns of a chat that take up what was computed of those before: the same text as from nothing, in less work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import SIZES, made_of, tiny_tokenizer
from transformers import Gemma3TextConfig, Lfm2Config, LlamaConfig, MistralConfig

from stackctl.engine.generation import PrefixCache, Sampling, generate_reply
from stackctl.engine.models import load_base
from stackctl.engine.records.prompt_files import Prompt
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.store import Registry

CONFIGS: dict[str, Any] = {
    "window": MistralConfig(**SIZES, sliding_window=16),
    "some windows": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "convolution": Lfm2Config(**SIZES, layer_types=["conv", "full_attention"]),
    "dynamic": LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
}  # fmt: skip
SAMPLING = Sampling(max_new_tokens=12)
TURNS = ["Tell me about the sea.", "And at night?", "海是什么？"]


@pytest.fixture
def other(run: Any, tmp_path: Path) -> Any:
    """A loaded base of one of ``CONFIGS``."""

    def load(name: str) -> Any:
        made_of(CONFIGS[name]).save_pretrained(tmp_path / "other")
        tiny_tokenizer().save_pretrained(tmp_path / "other")
        run("init")
        run("base", "add", "other", tmp_path / "other")
        registry = Registry(tmp_path / "registry")
        return load_base(resolve_base(registry, "other"), registry)

    return load


class Talk:
    """A conversation, and how many tokens went through the model for the last answer before its first token."""

    def __init__(self, stacked: Any) -> None:
        self.stacked, self.prefix_cache = stacked, PrefixCache()
        self.widths: list[int] = []
        stacked.model.get_input_embeddings().register_forward_pre_hook(
            lambda _, given: self.widths.append(given[0].shape[-1])
        )

    def answer(self, messages: list[dict[str, str]], hear: Any = lambda _: None) -> Any:
        self.widths.clear()
        return generate_reply(self.stacked, prompt(messages), SAMPLING, hear, self.prefix_cache)

    def from_nothing(self, messages: list[dict[str, str]]) -> Any:
        return generate_reply(self.stacked, prompt(messages), SAMPLING, lambda _: None)


def prompt(messages: list[dict[str, str]]) -> Prompt:
    return Prompt(messages[-1]["content"], messages)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma", *CONFIGS])
def test_the_text_of_every_turn_is_that_from_nothing(tiny_registry: Any, other: Any, name: str) -> None:
    talk = Talk(other(name) if name in CONFIGS else tiny_registry(name).load())
    messages: list[dict[str, str]] = []
    before = 0
    for number, text in enumerate(TURNS):
        messages = [*messages, user(text)]
        found = talk.answer(messages)
        first, tokens = talk.widths[0], found.prompt_tokens
        wanted = talk.from_nothing(messages)
        assert (found.text, found.new_tokens, found.stop) == (wanted.text, wanted.new_tokens, wanted.stop)
        if name not in CONFIGS:
            assert first <= tokens - before, "the prompt before is not computed again"
        elif name in ("convolution", "dynamic"):
            assert first == tokens, "these keep a state that cannot be taken up"
        before = tokens
        messages = [*messages, said(found.text)]
        if not number:
            again = talk.answer(messages[:-1])
            assert again.text == found.text
            assert talk.widths[0] == (1 if name not in CONFIGS else tokens)


def test_another_stack_another_beginning_and_back(h: Any) -> None:
    h.add("style", seed=1)
    stacked = h.load()
    style, bare = h.plan("style"), h.plan("base")
    talk = Talk(stacked)
    for plan in (style, bare, style):
        stacked.use(plan)
        asked = [user(TURNS[0])]
        assert talk.answer(asked).text == talk.from_nothing(asked).text
    asked = [{"role": "system", "content": "Be brief."}, user(TURNS[0])]
    assert talk.answer(asked).text == talk.from_nothing(asked).text


def test_what_was_stopped_is_taken_up_where_it_was_whole(tiny_registry: Any) -> None:
    """Ctrl-C between two tokens, and in the middle of a forward pass, when some layers know a token more."""
    talk = Talk(tiny_registry().load())
    asked = [user(TURNS[0])]
    wanted = talk.from_nothing(asked)
    assert wanted.new_tokens == 12
    heard: list[str] = []

    def stop(piece: str) -> None:
        heard.append(piece)
        if len(heard) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer(asked, stop)
    assert talk.answer(asked).text == wanted.text
    assert talk.widths[0] == 1

    passes: list[int] = []

    def interrupt(*_: Any) -> None:
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    layer = talk.stacked.model.model.layers[1].mlp.up_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        talk.answer(asked)
    layer.remove()
    assert talk.answer(asked).text == wanted.text
    assert talk.widths[0] == 1
    longer = [*asked, said(wanted.text), user(TURNS[1])]
    assert talk.answer(longer).text == talk.from_nothing(longer).text
