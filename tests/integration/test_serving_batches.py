"""Rows of different stacks in one running batch write what ``generate`` writes for each stack by itself."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from stackctl.core.errors import Usage
from stackctl.engine.generation import Sampling, generate
from stackctl.engine.generation.kv_cache import KVCache
from stackctl.engine.generation.padded_kv_cache import PaddedKVCache
from stackctl.engine.records.prompt_files import Prompt
from stackctl.engine.serving.batching import BatchingEngine
from stackctl.engine.serving.requests import Limits, QueueFull
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression

TEXTS = ["Hi.", "Tell me of the sea, and of the rain that falls on it.", "海", "One, two, three, four, five, six"]
STACKS = ["base", "style", "tone:0.5", "style+tone:-1.5", "style:2+tone+words"]


def answered(engine, plan, text, sampling, **options):
    """Submitted rows, and an event that is set when all have ended."""
    rows = engine.prepare(plan, [Prompt(text)], sampling, **options)
    ended, left, errors = threading.Event(), [len(rows)], []

    def end(row, error):
        left[0] -= 1
        errors.extend([error] if error else [])
        if not left[0]:
            ended.set()

    for row in rows:
        row.on_end = end
    engine.submit(rows)
    return rows, ended, errors


def expected(filled_registry, sampling):
    stacked = filled_registry.load()
    found = {}
    for name in STACKS:
        stacked.use(filled_registry.plan(name))
        for answer in generate(stacked, [Prompt(text) for text in TEXTS], sampling, batch_size=1):
            found[name, answer.prompt.text] = (answer.text, answer.stop, answer.new_tokens)
    return found


@pytest.fixture
def filled(tiny_registry):
    def make(kind):
        filled_registry = tiny_registry(kind)
        filled_registry.add("style", seed=1)
        filled_registry.add("tone", seed=2, r=3)
        filled_registry.add("words", seed=3, target_modules=["wte" if kind == "gpt2" else "embed_tokens"])
        return filled_registry

    return make


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral", "qwen3", "tied"])
def test_twenty_rows_of_five_stacks_at_once(filled, kind):
    filled_registry = filled(kind)
    sampling = Sampling(max_new_tokens=24)
    known = expected(filled_registry, sampling)
    assert len({text for text, _, _ in known.values()}) > len(TEXTS), "the stacks make a difference"
    engine = BatchingEngine(filled_registry.load(), Limits(rows=7, wait=64))
    try:
        asked = [
            (name, text, answered(engine, filled_registry.plan(name), text, sampling))
            for text in TEXTS
            for name in STACKS
        ]
        for name, text, (rows, ended, errors) in asked:
            assert ended.wait(60) and not errors
            assert (rows[0].text, rows[0].stop, rows[0].new_tokens) == known[name, text], (name, text)
    finally:
        engine.close()


@pytest.mark.parametrize(("kind", "rows"), [("llama", KVCache), ("qwen3", KVCache), ("gpt2", PaddedKVCache)])
def test_prompts_are_read_together_and_plain_decoders_step_by_few_operators(filled, kind, rows, monkeypatch):
    filled_registry, read, steps = filled(kind), [], []
    filled_registry.add("heads", seed=4, target_modules=["lm_head"])
    sampling = Sampling(max_new_tokens=24)
    known = expected(filled_registry, sampling)
    join, step = rows.join, rows.step
    monkeypatch.setattr(
        rows, "join", lambda self, prompts, *rest: read.append(len(prompts)) or join(self, prompts, *rest)
    )
    monkeypatch.setattr(rows, "step", lambda self, tokens: steps.append(len(tokens)) or step(self, tokens))
    engine = BatchingEngine(filled_registry.load(), Limits(rows=24))
    plans = {name: filled_registry.plan(name) for name in STACKS}
    plans["heads"] = filled_registry.plan("heads+style")
    stacked = filled_registry.load()
    stacked.use(plans["heads"])
    for answer in generate(stacked, [Prompt(text) for text in TEXTS], sampling, batch_size=1):
        known["heads", answer.prompt.text] = (answer.text, answer.stop, answer.new_tokens)
    read.clear()
    steps.clear()
    try:
        with engine._changed:  # all of them wait before any begins
            asked = [
                (name, text, answered(engine, plan, text, sampling)) for name, plan in plans.items() for text in TEXTS
            ]
        for name, text, (made, ended, errors) in asked:
            assert ended.wait(60) and not errors
            assert (made[0].text, made[0].stop, made[0].new_tokens) == known[name, text], (name, text)
    finally:
        engine.close()
    if rows is KVCache:
        assert read == [24]
    else:
        assert 1 < len(read) < 8 and sum(read) == 24
    assert steps[0] == 24 and len(steps) < 24


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_conversation_goes_on_from_what_is_computed_of_its_stack(filled, kind, monkeypatch):
    filled_registry, sampling = filled(kind), Sampling(max_new_tokens=8, raw=True)
    stacked, beginning = filled_registry.load(), "Tell me of the sea, and of the rain that falls on it. "
    engine, read = BatchingEngine(filled_registry.load()), []
    embeddings = engine._stacked.model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, given: read.append(given[0].numel()))
    text = beginning
    try:
        for turn, name in enumerate(["style", "style", "tone", "style+tone", "style"]):
            stacked.use(filled_registry.plan(name))
            known = next(generate(stacked, [Prompt(text)], sampling))
            read.clear()
            rows, ended, errors = answered(engine, filled_registry.plan(name), text, sampling, copies=3)
            assert ended.wait(60) and not errors
            assert {row.text for row in rows} == {known.text}
            length = len(rows[0].ids)
            if kind == "gpt2":
                assert read[0] == 3 * length, "transformers' forward computes all of it"
            elif turn in (0, 2, 3):
                assert read[0] == length + 2, "another stack's keys are no help"
            else:
                assert read[0] < length // 2
            if name == "style":
                text = text + known.text + " And then? "
    finally:
        engine.close()


def test_a_single_answer_is_guessed_ahead(filled, monkeypatch):
    filled_registry = filled("llama")
    sampling = Sampling(max_new_tokens=200, raw=True)
    stacked = filled_registry.load()
    stacked.use(filled_registry.plan("style+tone:-1.5"))
    prompt = Prompt("one two three, one two three, one two")
    known = next(generate(stacked, [prompt], sampling))
    engine, tokens, step = BatchingEngine(filled_registry.load()), [], KVCache.step
    monkeypatch.setattr(KVCache, "step", lambda self, new: tokens.append(len(new[0])) or step(self, new))
    try:
        rows, ended, errors = answered(engine, filled_registry.plan("style+tone:-1.5"), prompt.text, sampling)
        assert ended.wait(60) and not errors
        assert (rows[0].text, rows[0].stop) == (known.text, known.stop)
        assert max(tokens) > 1
    finally:
        engine.close()


def test_guesses_begin_anew_when_an_answer_is_alone_again(filled):
    filled_registry = filled("llama")
    sampling = Sampling(max_new_tokens=300, raw=True)
    stacked = filled_registry.load()
    prompt = Prompt("one two three, one two three, one two")
    stacked.use(filled_registry.plan("style"))
    long = next(generate(stacked, [prompt], sampling))
    stacked.use(filled_registry.plan("tone"))
    short = next(generate(stacked, [Prompt("Hi.")], replace(sampling, max_new_tokens=5)))
    engine = BatchingEngine(filled_registry.load())
    try:
        rows, ended, errors = answered(engine, filled_registry.plan("style"), prompt.text, sampling)
        for _ in range(6):
            others, left, _ = answered(engine, filled_registry.plan("tone"), "Hi.", replace(sampling, max_new_tokens=5))
            assert left.wait(60) and others[0].text == short.text
        assert ended.wait(60) and not errors
        assert (rows[0].text, rows[0].stop) == (long.text, long.stop)
    finally:
        engine.close()


def test_a_stack_that_is_no_sum_is_folded_in_its_turn(filled, run):
    filled_registry = filled("llama")
    run("compose", "style+tone", "--method", "ties", "--name", "mixed")
    sampling = Sampling(max_new_tokens=12)
    stacked = filled_registry.load()
    known = {}
    for name in ("mixed", "style"):
        stacked.use(filled_registry.plan(name))
        known[name] = next(generate(stacked, [Prompt("Hi.")], sampling)).text
    engine = BatchingEngine(filled_registry.load())
    try:
        asked = [
            (n, answered(engine, filled_registry.plan(n), "Hi.", sampling))
            for n in ("style", "mixed", "style", "mixed")
        ]
        for name, (rows, ended, errors) in asked:
            assert ended.wait(60) and not errors
            assert rows[0].text == known[name]
    finally:
        engine.close()


def test_sampling_is_that_of_generate(filled):
    filled_registry = filled("llama")
    sampling = Sampling(max_new_tokens=16, temperature=0.9, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=5)
    stacked = filled_registry.load()
    stacked.use(filled_registry.plan("style"))
    known = [answer.text for answer in generate(stacked, [Prompt("Hi."), Prompt("Hi.")], sampling, batch_size=1)]
    assert known[0] != known[1]
    engine = BatchingEngine(filled_registry.load())
    try:
        rows, ended, errors = answered(engine, filled_registry.plan("style"), "Hi.", sampling, copies=2)
        assert ended.wait(60) and not errors
        assert [row.text for row in rows] == known
    finally:
        engine.close()


def test_the_queue_is_bounded_and_adapters_leave_memory(filled):
    filled_registry = filled("llama")
    engine = BatchingEngine(filled_registry.load(), Limits(rows=1, wait=2, adapters=1))
    sampling = Sampling(max_new_tokens=400)
    try:
        with pytest.raises(Usage, match="3 answers, and 2 may wait"):
            answered(engine, filled_registry.plan("style"), "Hi.", sampling, copies=3)
        rows, full, _ = answered(engine, filled_registry.plan("style"), "Hi.", sampling, copies=2)
        with pytest.raises(QueueFull):
            answered(engine, filled_registry.plan("style"), "Hi.", sampling, copies=2)
        for row in rows:
            row.cancelled.set()
        assert full.wait(60)
        for name in ("style", "tone", "words"):
            rows, ended, errors = answered(engine, filled_registry.plan(name), "Hi.", Sampling(max_new_tokens=2))
            assert ended.wait(60) and not errors
        assert len(engine.resident) == 1
        rows, ended, _ = answered(engine, filled_registry.plan("style"), "Hi.", sampling)
        rows[0].cancelled.set()
        assert ended.wait(60) and rows[0].new_tokens < 400
    finally:
        engine.close()


def test_weights_by_layer_are_a_rows_own(filled):
    """Beside a row that has the same adapter everywhere, whichever of them was asked first."""
    filled_registry = filled("llama")
    by_layer = replace(
        resolve_expression(filled_registry.registry, "style+tone").members[0], layer_weights={"model.layers.0": 0.0}
    )
    stack = replace(resolve_expression(filled_registry.registry, "style+tone"), text="layered")
    layered = read_plan(filled_registry.registry, replace(stack, members=(by_layer, stack.members[1])))
    plans = [layered, filled_registry.plan("style+tone"), layered, filled_registry.plan("style")]
    sampling = Sampling(max_new_tokens=16)
    stacked = filled_registry.load()
    known = []
    for plan in plans:
        stacked.use(plan)
        known.append(next(generate(stacked, [Prompt("Hi.")], sampling)).text)
    assert known[0] != known[1]
    engine = BatchingEngine(filled_registry.load())
    try:
        asked = [answered(engine, plan, "Hi.", sampling) for plan in plans]
        for (rows, ended, errors), text in zip(asked, known, strict=True):
            assert ended.wait(60) and not errors
            assert rows[0].text == text
    finally:
        engine.close()


def test_turns_are_taken_in_the_order_of_asking(filled, run):
    """A folded stack waits for those that run, and those that came after it wait for it, however many there are."""
    filled_registry = filled("llama")
    run("compose", "style+tone", "--method", "ties", "--name", "mixed")
    engine = BatchingEngine(filled_registry.load(), Limits(rows=4, wait=64))
    ends = []
    try:
        asked, long = [], Sampling(max_new_tokens=60)
        for number, name in enumerate(["style", "tone"] + ["mixed", "style", "tone", "mixed"] * 4):
            rows = engine.prepare(filled_registry.plan(name), [Prompt("Hi.")], long)
            rows[0].on_end = lambda row, error, place=number: ends.append((place, error))
            engine.submit(rows)
            asked.append(name)
        deadline = time.monotonic() + 60
        while len(ends) < len(asked) and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        engine.close()
    order = [place for place, error in ends if error is None]
    assert len(order) == len(asked), "everybody's turn came"
    for turn, name in enumerate(asked):
        if name == "mixed":
            before, after = order[: order.index(turn)], order[order.index(turn) + 1 :]
            assert all(place < turn for place in before) and all(place > turn for place in after)
