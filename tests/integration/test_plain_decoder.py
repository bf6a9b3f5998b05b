"""Decoding by few operators: logits and texts are those of transformers' own, of rows that join and leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from stackctl.engine.base.private_weights import MappedModules
from stackctl.engine.generation import (
    Sampling,
    generate,
    kv_cache,
    mapped_weights,
    row_products,
    shared_prefixes,
)
from stackctl.engine.generation.mapped_weights import MappedWeights
from stackctl.engine.generation.plain_decoder import PlainDecoder, plain_decoder
from stackctl.engine.models import StackedModel, load_base
from stackctl.engine.records.prompt_files import Prompt
from stackctl.registry.base_entries import resolve_base

KNOWN = ["llama", "tied", "mistral", "qwen2", "qwen3"]
PROMPTS = [[5, 9, 14, 3, 8, 21, 30, 7, 2, 40], [11, 4], [17, 23, 6, 12], [33]]


@pytest.fixture
def changed(tiny_registry: Any, models: Any, tmp_path: Path) -> Any:
    """A registry whose base ``changed`` is a tiny model with another configuration, loaded."""

    def load(name: str, settings: dict[str, Any]) -> StackedModel:
        folder = tmp_path / "changed"
        shutil.copytree(models(name), folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **settings}))
        h = tiny_registry(name)
        h.run("base", "add", "changed", folder)
        return load_base(resolve_base(h.registry, "changed"), h.registry)

    return load


@pytest.fixture
def known(tiny_registry: Any, changed: Any) -> Any:
    """One of ``KNOWN``, with a stack folded where it is the registry's own base."""

    def load(name: str) -> StackedModel:
        if name == "mistral":
            without_window: StackedModel = changed(name, {"sliding_window": None})
            return without_window
        h = tiny_registry(name)
        h.add("style", seed=1)
        stacked: StackedModel = h.load()
        stacked.use(h.plan("style"))
        return stacked

    return load


def decoder_of(stacked: StackedModel) -> PlainDecoder:
    found = plain_decoder(stacked)
    assert found is not None
    return found


def by_transformers(stacked: StackedModel, ids: list[int]) -> Tensor:
    """The logits (vocabulary) behind some tokens, of one whole forward pass."""
    logits: Tensor = stacked.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
    return logits


def own_answer(stacked: StackedModel, asked: Sequence[int], count: int) -> list[int]:
    """What transformers' ``generate`` writes, with nothing that would end it."""
    model: Any = stacked.model
    model.generation_config = GenerationConfig()
    ids = torch.tensor([asked])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    tokens: list[int] = out[0, ids.shape[1] :].tolist()
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("name", KNOWN)
def test_logits_of_rows_that_join_and_leave_are_those_of_a_whole_pass(known: Any, name: str) -> None:
    stacked = known(name)
    rows = decoder_of(stacked).rows(3)
    texts = [list(prompt) for prompt in PROMPTS[:3]]
    torch.testing.assert_close(rows.join(texts), torch.stack([by_transformers(stacked, ids) for ids in texts]))
    for step in range(1, 150):  # beyond the memory that is made at first
        if step == 3:
            rows.leave(0)
            texts[0] = texts.pop()
        if step == 5:
            texts.append(list(PROMPTS[3]))
            torch.testing.assert_close(rows.join(texts[2:])[0], by_transformers(stacked, texts[2]))
        new = [step % 50 + row for row in range(len(texts))]
        texts = [[*ids, token] for ids, token in zip(texts, new, strict=True)]
        found = rows.step([[token] for token in new])[:, 0]
        if step < 8 or step > 147:
            wanted = torch.stack([by_transformers(stacked, ids) for ids in texts])
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_short_texts_join_one_that_is_long(known: Any) -> None:
    """Room was made for the new ones alone, by their length: every short request failed beside a long one."""
    stacked = known("llama")
    rows = decoder_of(stacked).rows(4)
    texts = [[(7 * place) % 251 for place in range(450)]]
    rows.join(texts)
    for new in ([11, 4], [33], [5, 9, 14]):
        torch.testing.assert_close(rows.join([new])[0], by_transformers(stacked, new))
        texts = [[*ids, 11] for ids in [*texts, new]]
        wanted = torch.stack([by_transformers(stacked, ids) for ids in texts])
        torch.testing.assert_close(rows.step([[11]] * len(texts))[:, 0], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_what_prompts_share_is_computed_once(known: Any, name: str) -> None:
    """With a row that is written, with a text that is finished, with one another, and that again with another."""
    stacked, beginning = known(name), list(range(3, 40))
    decoder = decoder_of(stacked)
    rows, read = decoder.rows(8), []
    decoder.read = lambda tokens, prompts: read.append(len(tokens)) or PlainDecoder.read(decoder, tokens, prompts)  # type: ignore[method-assign, func-returns-value]
    finished = decoder.rows(1)
    finished.join([[9, 8, *beginning, 1]])
    texts = [[*beginning, 7]]
    rows.join(texts)
    joining = [
        [*beginning, 41, 42],
        [9, 8, *beginning, 2, 3],
        [9, 8, *beginning, 2, 4, 5],
        [*beginning, 41, 43],
        [33, 34],
    ]
    plain = [shared_prefixes.Text(ids, None) for ids in [*texts, [9, 8, *beginning, 1], *joining]]
    prefixes = shared_prefixes.shared_prefixes(plain[2:], plain[:2])
    assert {(one.prompt, one.source, one.tokens) for one in prefixes} == {
        (0, 0, 37),
        (3, 2, 38),
        (1, 1, 39),
        (2, 3, 40),
    }
    found = rows.join(joining, prefixes, [finished.text(0)])
    assert read[1:] == [38, 2 + 2 + 2 + 1 + 2]
    texts += joining
    torch.testing.assert_close(found, torch.stack([by_transformers(stacked, ids) for ids in joining]))
    texts = [[*ids, 11] for ids in texts]
    torch.testing.assert_close(
        rows.step([[11]] * 6)[:, 0], torch.stack([by_transformers(stacked, ids) for ids in texts])
    )


@torch.no_grad()
def test_rows_are_put_in_order_and_attend_in_several_calls(known: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = known("qwen3")
    config = stacked.model.config
    monkeypatch.setattr(kv_cache, "_CALL", 10 * config.num_key_value_heads * config.head_dim)
    monkeypatch.setattr(kv_cache, "_MOVED", 1)
    rows = decoder_of(stacked).rows(8)
    texts = [[(7 * row + at) % 50 for at in range(length)] for row, length in enumerate((40, 3, 90, 5, 41, 4, 88))]
    rows.join(texts)
    moved = 0
    for step in range(1, 70):
        order = list(rows.order())
        assert sorted(order) == list(range(len(texts)))
        moved += order != sorted(order)
        texts = [texts[row] for row in order]
        new = [step % 50 + row for row in range(len(texts))]
        texts = [[*ids, token] for ids, token in zip(texts, new, strict=True)]
        found = rows.step([[token] for token in new])[:, 0]
        wanted = torch.stack([by_transformers(stacked, ids) for ids in texts])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        assert len(rows._calls) > 1
        if step == 20:
            rows.leave(1)
            texts[1] = texts.pop()
    assert [len(ids) for ids in texts] == sorted(map(len, texts))
    assert moved == 2, "when it has paid, and no more often"


def test_copied_weights_are_the_bases_and_stacks_are_folded_into_them(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    h.add("style", seed=1)
    stacked, plain = h.load(), h.load()
    base = {name: weight.clone() for name, weight in stacked.model.named_parameters()}
    monkeypatch.setattr(mapped_weights, "_LEAST", 1)
    monkeypatch.setattr(MappedWeights, "_gain", lambda self: 1.0)
    mapped = MappedModules(stacked.folder, list(stacked.model.model.layers))
    sampling = Sampling(max_new_tokens=24, raw=True)
    for name in ("base", "style", "base", "style"):
        for one in (stacked, plain):
            one.use(h.plan(name))
        if name == "base":
            assert all(torch.equal(weight, base[key]) for key, weight in stacked.model.named_parameters())
        wanted = own_answer(plain, plain.tokenizer("one two three").input_ids, 24)
        [found] = generate(stacked, [Prompt("one two three")], sampling)
        assert list(found.ids) == wanted[: len(found.ids)] and len(found.ids) > 12
        assert not any(mapped.sizes), "nothing is mapped any more"


@torch.no_grad()
def test_a_row_that_is_no_number_leaves_nothing_behind(known: Any) -> None:
    stacked = known("llama")
    rows = decoder_of(stacked).rows(3)
    texts = [list(range(3, 43)), list(PROMPTS[0]), list(range(5, 55))]
    rows.join(texts)
    rows._memory[:, :, 0, :, :40] = float("nan")
    broken = rows.step([[7], [8], [9]])
    assert broken[0].isnan().all() and broken[1:].isfinite().all(), "the others do not see it"
    rows.leave(2)
    rows.leave(0, failed=True)
    texts = [[*texts[1], 8], list(PROMPTS[2]), list(range(5, 55))]
    rows.join(texts[1:])
    for token in (11, 12, 13):
        texts = [[*ids, token] for ids in texts]
        wanted = torch.stack([by_transformers(stacked, ids) for ids in texts])
        torch.testing.assert_close(rows.step([[token]] * 3)[:, 0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_many_answers_from_packed_weights_are_the_same(known: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = known(name)
    prompts = [Prompt("word " * (number % 7 + 1) + str(number)) for number in range(20)]
    packed, pack = [], row_products.pack

    def counted(asked: Sequence[Any]) -> None:
        pack(asked)
        packed.append(sum(getattr(one, "packed", None) is not None for one in asked[:7]))

    monkeypatch.setattr(row_products, "pack", counted)
    answers = list(generate(stacked, prompts, Sampling(max_new_tokens=40, raw=True)))
    assert packed
    assert set(packed) == {7 if torch.backends.mkl.is_available() else 0}
    assert len(packed) <= 10, "memory is not looked at before each step"
    for answer in answers:
        assert list(answer.ids) == own_answer(stacked, answer.asked, 40)[: len(answer.ids)]


@pytest.mark.parametrize(
    ("name", "batch_size"), [*((name, size) for name in KNOWN for size in (None, 2)), ("llama", 1), ("llama", 4)]
)
def test_answers_are_those_of_transformers_own_generate(known: Any, name: str, batch_size: int | None) -> None:
    stacked = known(name)
    prompts = [
        Prompt(text) for text in ("Hi", "海是什么？", "A rather longer prompt than the others.", "Who?", "One, two")
    ]
    answers = list(generate(stacked, prompts, Sampling(max_new_tokens=12, raw=True), batch_size=batch_size))
    assert [answer.prompt for answer in answers] == prompts
    for answer in answers:
        assert list(answer.ids) == own_answer(stacked, answer.asked, 12)[: len(answer.ids)]
        assert answer.stop == ("length" if len(answer.ids) == 12 else "end")


@pytest.mark.parametrize(
    ("name", "processor", "most", "passed"),
    [*((name, "AVX512", 15, 100) for name in KNOWN), ("llama", "AVX2", 7, 110)],
)
def test_an_answer_that_repeats_itself_takes_few_passes(
    known: Any, name: str, processor: str, most: int, passed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_products, "_processor", lambda: processor)
    stacked = known(name)
    passes = []
    step = PlainDecoder.step

    def counted(decoder: Any, tokens: Tensor, rows: Any) -> Tensor:
        passes.append(len(tokens))
        return step(decoder, tokens, rows)

    monkeypatch.setattr(PlainDecoder, "step", counted)
    with torch.no_grad():
        for layer in stacked.model.model.layers:
            layer.self_attn.o_proj.weight *= 0.1  # nearly by the last token alone, so that it soon goes round
    [answer] = generate(stacked, [Prompt("one two three")], Sampling(max_new_tokens=150, raw=True))
    assert list(answer.ids) == own_answer(stacked, answer.asked, 150)
    assert answer.new_tokens == 150
    assert len(passes) < passed
    assert max(passes) == most + 1


@pytest.mark.parametrize("name", ["gpt2", "gemma", "phi3", "neox", "mixtral"])
def test_other_models_are_left_to_transformers(tiny_registry: Any, name: str) -> None:
    assert plain_decoder(tiny_registry(name).load()) is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mistral", {"sliding_window": 8}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}),
    ],
)
def test_windows_and_positions_that_change_are_left_to_transformers(
    changed: Any, name: str, settings: dict[str, Any]
) -> None:
    assert plain_decoder(changed(name, settings)) is None


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operators(stacked: StackedModel, prompts: list[Prompt], *, more: int = 8) -> float:
    """Operators from one token to the next."""
    counts = []
    for tokens in (4, 4 + more):
        with _Count() as counter:
            list(generate(stacked, prompts, Sampling(max_new_tokens=tokens, raw=True)))
        counts.append(counter.count)
    return (counts[1] - counts[0]) / more


@pytest.mark.parametrize(("processor", "share"), [("AVX512", 0.6), ("AVX2", 0.75)])  # blocks take views
def test_a_token_takes_half_the_operators_of_transformers_and_no_more_for_more_rows(
    tiny_registry: Any, processor: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_products, "_processor", lambda: processor)
    stacked = tiny_registry().load()
    ours = operators(stacked, [Prompt("Hi")])
    many = operators(stacked, [Prompt("Hi"), Prompt("Who?"), Prompt("A rather longer prompt.")])
    monkeypatch.setattr("stackctl.engine.generation.transformers_answers.plain_decoder", lambda _: None)
    theirs = operators(stacked, [Prompt("Hi")])
    assert ours < share * theirs
    assert many < 1.6 * ours, "rows of unlike length have a mask, and places of their own"
