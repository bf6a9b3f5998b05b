"""The cache of tokens: the same numbers with and without it, never another data's, and as large as a disk."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from oracle import write_jsonl
from tiny import CHATML, tiny_tokenizer

from stackctl.core.errors import Usage
from stackctl.engine.data import token_cache as cache
from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import Encoded, EncodeOptions
from stackctl.engine.data.rows import one_by_one, pack
from stackctl.engine.data.token_cache import encode_cached
from stackctl.engine.records.read import open_records, read_records

pytestmark = pytest.mark.usefixtures("empty_token_cache")

CHATS = [
    {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "answer " * (n % 5 + 1)}]}
    for n in range(30)
]


def cached(path: Path, tokenizer: Any = None, max_length: int = 100, cache: bool = True, **options: Any) -> Encoded:
    wanted = EncodeOptions(max_length, **options)
    return encode_cached(open_records(path), tokenizer or tiny_tokenizer(), wanted, cache=cache)


def entries(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()} if root.exists() else set()


def never(*_: Any, **__: Any) -> Any:
    pytest.fail("the cache should have answered")


def test_what_is_read_back_is_what_was_made(
    tmp_path: Path, empty_token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    wanted = encode(read_records(path), tiny_tokenizer(), EncodeOptions(40))
    made = cached(path, max_length=40)
    monkeypatch.setattr(cache, "encode_pieces", never)
    again = open_records(path)
    kept = encode_cached(again, tiny_tokenizer(), EncodeOptions(40))
    assert (again.format, again.count) == ("messages", 30)
    for found in (made, kept):
        assert list(found.examples) == wanted.examples
        assert found.examples[-1] == wanted.examples[-1]
        assert found.examples[3:7] == wanted.examples[3:7]
        assert (found.tokens, found.supervised_tokens) == (wanted.tokens, wanted.supervised_tokens)
        assert (found.truncated, found.unsupervised, found.notes) == (
            wanted.truncated, wanted.unsupervised, wanted.notes,
        )  # fmt: skip
        assert list(pack(found.examples, 60)) == list(pack(wanted.examples, 60))
        assert list(one_by_one(found.examples)) == [[example] for example in wanted.examples]
    assert len(entries(empty_token_cache)) == 1


@pytest.mark.parametrize("name", ["about.json", "examples.arrow"])
def test_an_entry_of_which_half_is_gone_is_made_again(tmp_path: Path, empty_token_cache: Path, name: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    cached(path)
    (entry,) = entries(empty_token_cache)
    (empty_token_cache / entry / name).unlink()
    cached(path)
    assert entries(empty_token_cache) == {entry}
    assert (empty_token_cache / entry / name).is_file()


def test_whatever_decides_the_tokens_decides_the_entry(tmp_path: Path, empty_token_cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    cached(path)
    cached(write_jsonl(tmp_path / "copy.jsonl", CHATS))  # the same bytes under another name
    assert len(entries(empty_token_cache)) == 1
    other = tiny_tokenizer()
    other.chat_template = CHATML.replace("<|im_end|>", "<|im_end|> ")
    spelled = tiny_tokenizer()
    spelled.eos_token = "!"
    for number, made in enumerate(
        (
            lambda: cached(path, max_length=99),
            lambda: cached(path, split_long=True),
            lambda: cached(path, other),
            lambda: cached(path, spelled),
            lambda: cached(write_jsonl(tmp_path / "b.jsonl", CHATS[1:])),
        ),
        2,
    ):
        made()
        assert len(entries(empty_token_cache)) == number


def test_a_damaged_entry_is_made_again(tmp_path: Path, empty_token_cache: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    wanted = list(cached(path).examples)
    (place,) = empty_token_cache.iterdir()
    for name, content in (("examples.arrow", b"ARROW1 no more"), ("about.json", b'{"tokens": '), ("about.json", b"{}")):
        (place / name).write_bytes(content)
        assert list(cached(path).examples) == wanted
        assert (place / name).read_bytes() != content


def test_an_entry_that_another_run_named_first_is_left_to_it(
    tmp_path: Path, empty_token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    wanted = list(cached(path).examples)
    monkeypatch.setattr(cache, "_read", lambda *_: None)  # as if it had not been there a moment ago
    late = cached(path)
    assert list(late.examples) == wanted
    assert len(entries(empty_token_cache)) == 1


def test_bad_data_leaves_nothing_and_is_named_whole(tmp_path: Path, empty_token_cache: Path) -> None:
    bad: list[Any] = [*CHATS, {"messages": []}, *CHATS, {"text": "x"}, {"messages": [{"role": "user", "content": "q"}]}]
    with pytest.raises(Usage, match=r"line 31: has no assistant turn; line 62: .*; line 63: has no assistant"):
        cached(write_jsonl(tmp_path / "a.jsonl", bad))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].content == 'q7' %}{{ raise_exception('no 7') }}{% endif %}" + CHATML
    with pytest.raises(Usage, match="line 8: no 7; line 38: no 7"):
        cached(write_jsonl(tmp_path / "b.jsonl", CHATS * 2), tokenizer)
    assert entries(empty_token_cache) == set()


def test_data_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, empty_token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    records = open_records(path)
    write_jsonl(path, CHATS[1:])
    with pytest.raises(Usage, match="changed while it was read"):
        encode_cached(records, tiny_tokenizer(), EncodeOptions(100))
    assert entries(empty_token_cache) == set()


def test_off_or_not_writable_means_in_memory(
    tmp_path: Path, empty_token_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", CHATS)
    wanted = encode(read_records(path), tiny_tokenizer(), EncodeOptions(100))
    assert cached(path, cache=False) == wanted
    assert entries(empty_token_cache) == set()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "file" / "cache"))
    assert cached(path) == wanted


def test_what_nobody_used_for_a_month_goes(tmp_path: Path, empty_token_cache: Path) -> None:
    cached(write_jsonl(tmp_path / "a.jsonl", CHATS))
    (old,) = empty_token_cache.iterdir()
    month_ago = time.time() - 31 * 24 * 3600
    os.utime(old, (month_ago, month_ago))
    cached(write_jsonl(tmp_path / "a.jsonl", CHATS))  # asked for: young again
    cached(write_jsonl(tmp_path / "b.jsonl", CHATS[1:]))
    assert len(entries(empty_token_cache)) == 2
    os.utime(old, (month_ago, month_ago))
    cached(write_jsonl(tmp_path / "c.jsonl", CHATS[2:]))
    assert old.name not in entries(empty_token_cache)
    assert len(entries(empty_token_cache)) == 2


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """Eight times the data, the same peak; in memory it would be eight times as much."""

    def peak(records: int) -> int:
        path = write_jsonl(tmp_path / f"{records}.jsonl", [{"text": f"{n} " + "x" * 400} for n in range(records)])
        tracemalloc.start()
        try:
            found = cached(path, max_length=1000)
            rows = pack(found.examples, 1000)
            assert sum(len(row) for row in (rows[0], rows[len(rows) - 1])) > 1
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(600)  # what is loaded once
    assert peak(5600) < 1.5 * peak(700)


def test_training_is_the_same_with_and_without(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    h.train("without", "--max-steps", 3, "--no-cache")
    h.train("made", "--max-steps", 3)
    monkeypatch.setattr(cache, "encode_pieces", never)
    h.train("kept", "--max-steps", 3)
    weights = "adapter_model.safetensors"
    assert h.bytes_of("without")[weights] == h.bytes_of("made")[weights] == h.bytes_of("kept")[weights]
    assert (
        h.registry.find_adapter("kept").newest().data.records == h.registry.find_adapter("made").newest().data.records
    )
