"""What prompts share: as much as there is, of texts that are computed alike, and behind what it is copied from."""

from __future__ import annotations

import random

import pytest

from stackctl.engine.data.shared_beginnings import common_prefix
from stackctl.engine.generation import shared_prefixes as module
from stackctl.engine.generation.shared_prefixes import Prefix, Text, shared_prefixes


def texts(chance: random.Random, count: int) -> list[Text]:
    """Of few tokens, so that many share something; of two kinds."""
    return [
        Text([chance.randrange(2) for _ in range(chance.randrange(1, 9))], chance.choice(["one", {"two": 2.0}]))
        for _ in range(count)
    ]


@pytest.mark.parametrize("seed", range(40))
def test_each_beginning_is_computed_once(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", 1)
    chance = random.Random(seed)
    known, prompts = texts(chance, chance.randrange(4)), texts(chance, chance.randrange(1, 9))
    prefixes = shared_prefixes(prompts, known)
    every, taken = [*known, *prompts], {one.prompt: one for one in prefixes}
    assert len(taken) == len(prefixes)
    ready = {number for number in range(len(prompts)) if number not in taken}
    for one in prefixes:
        prompt, source = prompts[one.prompt], every[one.source]
        assert source.weights == prompt.weights
        assert source.ids[: one.tokens] == prompt.ids[: one.tokens] and one.tokens < len(prompt.ids)
        assert one.source < len(known) or one.source - len(known) in ready, "what it is copied from stands before it"
        ready.add(one.prompt)
    there, computed = list(known), 0
    for text in sorted(prompts, key=lambda text: text.ids):  # every one with all that are before it
        most = max((common_prefix(text.ids, other.ids) for other in there if other.weights == text.weights), default=0)
        computed += len(text.ids) - min(most, len(text.ids) - 1)
        there.append(text)
    assert computed == sum(len(text.ids) for text in prompts) - sum(one.tokens for one in prefixes)


def test_a_few_tokens_are_computed_again() -> None:
    few, more = [5, 6, 7], [5, 6, 7, 8]
    assert shared_prefixes([Text([*few, 1], None)], [Text([*few, 2], None)]) == []
    assert shared_prefixes([Text([*more, 1], None)], [Text([*more, 2], None)]) == [Prefix(0, 0, 4)]
    assert shared_prefixes([Text(more * 2, "style")], [Text(more * 2, "tone")]) == []


@pytest.mark.parametrize("length", [0, 1, 2, 7, 8])
def test_how_much_two_texts_share(length: int) -> None:
    assert common_prefix([*range(length), -1], [*range(length), -2, 3]) == length
    assert common_prefix(range(length), range(length + 3)) == length
