"""A quick look at YAML says what the strict parser says, or nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from yaml_values import same, scalars, texts, values

from stackctl.core.errors import Usage
from stackctl.core.schema import Adapter, AdapterVersion, DataSource, Lora, Run, TrainSettings
from stackctl.registry.entry_text import format_entry
from stackctl.storage.yaml_fast import read_quickly
from stackctl.storage.yaml_text import format_yaml, parse_yaml

FROZEN = sorted((Path(__file__).parent.parent / "frozen").glob("*/registry/**/*.yaml"))
VERSIONS = [
    AdapterVersion(
        version=number, digest=f"sha256:{number:064x}", path=f"weights/style/{number}", base="tiny",
        fingerprint="sha256:" + "0" * 64, trained_on=["before@1", "then@2:-0.5"][:number],
        created="2026-01-31T12:00:00Z",
        lora=Lora(r=8, lora_alpha=16.0, target_modules=["q_proj", "v_proj"], alpha_pattern={"layers.0.q_proj": 4.0}),
        parameters=1000, dtype="float32", bytes=4000,
        data=DataSource(path="chat data.jsonl", sha256="sha256:" + "1" * 64, records=200, format="messages"),
        settings=msgspec.to_builtins(TrainSettings(target_modules=["q_proj"])),
        run=Run(steps=9, epochs=3.0, loss=1.25, tokens=9, supervised_tokens=5, seconds=1e-7, frozen="fold"),
        versions={"stackctl": "0.1.0", "torch": "2.13.0+cpu"},
    )
    for number in range(3)
]  # fmt: skip
ENTRY = format_entry(msgspec.to_builtins(Adapter(name="style", description="the voice", versions=VERSIONS)))
PIECES = [
    "\n", "\n  ", "\n    ", "\n- ", "\n-", "\n  - ", "- ", "-", ":", ": ", " :", " ", "  ", "#", " #", "'", '"', "{",
    "}", "[", "]", ", ", ",", "&a ", "*a", "!t ", "|", ">", "?", "? ", "...", "---", "%", "@", "`", "~", "=", "<<",
    "null", "on", "1", "-1", "1e-5", ".inf", "a", "a: b", "a:\n", "name: x\n", "schema: 1\n", "\t", "\r", "\x85",
    "\u2028", "\ufeff", "é", "海", "٣", "\xa0", "\x07", "{a: b}", "[a, b]", "{}", "[]", "'a, b'", "''", "a b", "a:b",
    "(a)", "$", ";", "\\",
]  # fmt: skip


def check(text: str) -> bool:
    """Whether a quick look was enough; what it saw is then right."""
    quick = read_quickly(text)
    if quick is None:
        return False
    try:
        strict = parse_yaml(text, "f")[0]
    except Usage as error:
        raise AssertionError(f"refused: {error.message}\n{text!r}") from None
    assert same(quick, strict), text
    return True


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.stem)
def test_what_stackctl_wrote_needs_no_other_parser(path: Path) -> None:
    assert check(path.read_text())


def test_an_entry_with_everything_in_it_needs_no_other_parser() -> None:
    assert check(ENTRY)


@settings(max_examples=400)
@given(st.integers(0, 2**32))
def test_a_damaged_entry(seed: int) -> None:
    chance = random.Random(seed)
    text = chance.choice([ENTRY, *(path.read_text() for path in FROZEN)])
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(text))
        end = start + chance.choice([0, 0, 1, 1, 2, 5, 40])
        text = text[:start] + chance.choice(["", *PIECES, text[end : end + 30]]) + text[end:]
    check(text)


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_lines_of_an_entry_in_any_order_and_any_column(seed: int) -> None:
    chance = random.Random(seed)
    lines = chance.choices(ENTRY.splitlines(), k=chance.randint(1, 6))
    lines = [" " * chance.choice([0, 0, 1, 2, 2, 4]) + line.strip() for line in lines]
    check("\n".join(lines) + "\n")


@settings(max_examples=500)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@example("a:\n  b:\n  - x\n- y")
@example("a:\n- k:\n- x")
@example("a:\n- k:\n  - x\n  -\n- y")
@example("a: {b: 1, b: 2}")
@example("a: 1\na: 2")
@example("a:\n- - b")
@example("- a")
@example("a: b: c")
@example("a: {b: [c, 'd, e'], f: 'g}'}")
@example("a: 'b\n  c'")
@example("a: b\n  c")
@example("a: -\nb: - c")
def test_anything_that_looks_like_yaml(text: str) -> None:
    check(text + "\n")
    check(text)


@settings(max_examples=50)
@given(st.dictionaries(texts, values, max_size=4))
def test_whatever_can_be_written(value: Any) -> None:
    check(format_yaml(value))
    check(format_entry(value))


PLACES = [
    "{}", "{}\n", "a: {}\n", "{}: a\n", "a:\n- {}\n", "a: [{}]\n", "a: {{b: {}}}\n", "a: {{{}: b}}\n", "a: '{}'\n",
    "a: ['{}', b]\n", "a:\n  b:\n  - {}\n",
]  # fmt: skip
WORDS = st.text(alphabet="abz019._/+@~()=-: ,'{}[]", max_size=8)


@settings(max_examples=500)
@given(WORDS | scalars.map(str))
def test_a_word_in_every_place(word: str) -> None:
    for place in PLACES:
        check(place.format(word))


@pytest.mark.parametrize(
    "text",
    ["a:\n" * 1000, "a: " + "[" * 1000, "a:\n  " * 1000, "a: " + "b " * 100_000, "a: {" + "b: c, " * 100_000,
     "a: [" + "b, " * 100_000, "a: '" + "b" * 300_000, "".join(" " * 2 * n + "a:\n" for n in range(500))],
    ids=range(8),
)  # fmt: skip
def test_what_is_long_or_deep_takes_no_time_and_no_stack(text: str) -> None:
    assert read_quickly(text + "\n") is None or check(text + "\n")


def test_too_many_values_are_left_to_who_counts_them() -> None:
    assert read_quickly("a: [" + "1, " * 600_000 + "1]\n") is None
    assert check("a: [" + "1, " * 1000 + "1]\n")
