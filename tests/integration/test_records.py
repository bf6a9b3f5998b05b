"""Records by shape, out of every kind of file; what is wrong is named by line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import USER, chat, turns

from stackctl.core.errors import HubFailure, NotFound, StackctlError, Usage
from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import EncodeOptions
from stackctl.engine.records.read import read_records
from stackctl.engine.records.types import ChatRecord, CompletionRecord, TextRecord
from stackctl.storage.hashes import sha256_file


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


SHAPES = {
    "text": ({"text": "Hi."}, TextRecord(1, "Hi.")),
    "messages": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, None),
    "conversations": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None),
    "prompt": ({"prompt": "q", "completion": "a"}, CompletionRecord(1, "q", "a")),
    "instruction": ({"instruction": "q", "input": "", "output": "a"}, None),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_read_from_every_kind_of_file(shape: str, tmp_path: Path) -> None:
    record, expected = SHAPES[shape]
    expected = expected or chat("q", "a")
    jsonl = write(tmp_path / "a.jsonl", record, record)
    listed = write(tmp_path / "a.json", [record, record])
    lines = write(tmp_path / "b.json", record, record)
    pq.write_table(pa.Table.from_pylist([record, record]), tmp_path / "a.parquet")
    for path in (jsonl, listed, lines, tmp_path / "a.parquet"):
        found = read_records(path)
        assert (found.format, found.count, found.records[0]) == (shape, 2, expected)
        assert (found.path, found.sha256) == (str(path), sha256_file(path))
    assert read_records(str(jsonl)).place(2) == "line 2"
    assert read_records(listed).place(2) == "record 2"


def test_roles_of_sharegpt_become_those_of_chat_templates(tmp_path: Path) -> None:
    names = ["system", "human", "gpt", "user", "chatgpt", "observation", "model", "tool", "bard"]
    path = write(tmp_path / "a.jsonl", {"conversations": [{"from": name, "value": "x"} for name in names]})
    record = read_records(path).records[0]
    assert isinstance(record, ChatRecord)
    assert [m["role"] for m in record.messages] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "assistant", "tool", "assistant")
    ]


def test_the_more_specific_shape_wins_and_other_keys_are_ignored(tmp_path: Path) -> None:
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is …", "id": 7}
    record = read_records(write(tmp_path / "a.jsonl", alpaca)).records[0]
    assert record == chat("Add.\n\n1 and 2", "3")
    ultra = {"prompt": "q", "messages": SHAPES["messages"][0]["messages"]}
    assert read_records(write(tmp_path / "b.jsonl", ultra)).format == "messages"
    assert read_records(write(tmp_path / "c.jsonl", {"messages": None, "text": "a"})).format == "text"


def test_prompt_and_completion_of_messages_are_a_chat_of_which_the_prompt_is_context(
    tmp_path: Path, smollm2: Any
) -> None:
    few_shot = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "2+2?"},
    ]
    path = write(tmp_path / "a.jsonl", {"prompt": few_shot, "completion": [{"role": "assistant", "content": "four"}]})
    found = encode(read_records(path), smollm2, EncodeOptions(512))
    assert turns(smollm2, found.examples[0]) == ["four<|im_end|>"]


def test_byte_order_mark_crlf_blank_lines_and_u2028_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "a\u2028b"}\r\n\r\n   \n{"text": "c"}'.encode())
    assert read_records(path).records == [TextRecord(1, "a\u2028b"), TextRecord(4, "c")]
    path.write_bytes(b"\xef\xbb\xbf" + b'\n\n{"text": 1}\r\n')
    with pytest.raises(Usage, match="line 3: 'text' is a number, not a string"):
        read_records(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one,\rtwo\r\rthree\r"),
        ("a.csv", 'text,note\r"one,\rtwo",x\rthree,\r'),
        ("a.jsonl", '{"text": "one,\\ntwo"}\r{"text": "three"}'),
        ("a.json", '[{"text": "one,\\ntwo"},\r {"text": "three"}]\r'),
    ],
)
def test_lines_may_end_with_a_carriage_return(name: str, content: str, encoding: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content.encode(encoding))
    inside = "\r" if name == "a.csv" else "\n"  # what is quoted stays as it is
    assert [record.text for record in read_records(tmp_path / name).records] == [f"one,{inside}two", "three"]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("semicolons.csv", ";"), ("a.tsv", "\t")])
def test_line_ends_in_a_quoted_field_stay_as_they_are(name: str, separator: str, line_end: str, tmp_path: Path) -> None:
    text = "one\r\ntwo\nthree\rfour\r\n"
    rows = [["text", "note"], [text, "x"], ["five", "\r"], [f"{line_end}y", ""], ["six", ""]]
    stream = io.StringIO(newline="")
    csv.writer(stream, delimiter=separator, lineterminator=line_end).writerows(rows)
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (tmp_path / name).write_bytes(stream.getvalue().encode(encoding))
        with (tmp_path / name).open(encoding=encoding, newline="") as file:
            wanted = [row["text"] for row in csv.DictReader(file, delimiter=separator)]
        records = read_records(tmp_path / name).records
        assert [record.text for record in records] == wanted == [text, "five", f"{line_end}y", "six"]
        assert [record.number for record in records] == [2, 6, 7, 9]


def test_a_text_file_holds_documents_separated_by_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\r\nOne,\r\ntwo.\r\n \r\n\r\n  海。\r\n".encode())
    found = read_records(path)
    assert (found.format, found.unit) == ("text", "line")
    assert found.records == [TextRecord(2, "One,\ntwo."), TextRecord(6, "  海。")]


GOOD = {"text": "fine"}
CALL = {"role": "assistant", "content": None}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a" "b"}', r"line 2, column 14: not valid JSON: Expecting ',' delimiter"),
        ('{"text": "é" "b"}', r"line 2, column 14: not valid JSON"),
        ('{"text": "a"', r"line 2, column 13: not valid JSON"),
        ("{'text': 'a'}", r"line 2, column 2: not valid JSON: Expecting property name"),
        ('{"text": NaN}', r"line 2, column 10: not valid JSON: NaN is not JSON"),
        ('{"text": "a", "text": "b"}', r"line 2: the key 'text' is there twice"),
        ('{"text": "a", "meta": {"n": 1, "n": 2}}', r"line 2: the key 'n' is there twice"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", r"line 2: not valid JSON: a number of thousands of digits"),
        ('{"text": "a", "score": -Infinity}', r"line 2, column 25: not valid JSON: -Infinity is not JSON"),
        (r'{"text": "\ud800"}', r"line 2: not valid JSON: half a character"),
        (r'{"text": "lost", "text": "\u0022\u0022\u0022\u0022 kept"}', r"line 2: the key 'text' is there twice"),
        ('\ufeff{"text": "a"}', r"line 2, column 1: not valid JSON: a byte-order mark that is not at the beginning"),
        ('{"text": "a", "score": 1e999}', r"line 2: not valid JSON: a number too large for 64 bits"),
        ("[" * 100_000, r"line 2: not valid JSON: nested too deeply"),
        ('["a"]', r"line 2: a list, not an object"),
        ("7", r"line 2: a number, not an object"),
        ("{}", r"line 2: of no known shape \(it has nothing\)"),
        ('{"instruction": "a", "reply": "b"}', r"line 2: of no known shape \(it has 'instruction', 'reply'\)"),
        ('{"text": ""}', r"line 2: 'text' is empty"),
        ('{"text": " \\n\\t"}', r"line 2: 'text' is empty"),
        ('{"text": null}', r"line 2: 'text' is null, not a string"),
        ('{"text": 1.5}', r"line 2: 'text' is a number, not a string"),
        ('{"text": true}', r"line 2: 'text' is a boolean, not a string"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, line)
    with pytest.raises(Usage, match=message) as caught:
        read_records(path)
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "has no assistant turn"),
        ([USER], "has no assistant turn"),
        ("hello", "'messages' is a string, not a list of messages"),
        ([USER, "a"], "message 2 is a string, not an object"),
        ([USER, {"role": "assistant"}], "message 2's 'content' is null, not a string"),
        ([USER, {"role": "assistant", "content": ""}], "message 2's 'content' is empty"),
        ([USER, {"role": "assistant", "content": [{"type": "text"}]}], "part 1 of message 2's 'content' is null"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}], "a part of the type 'image'"),
        ([USER, {"role": "assistant", "content": 7}], "message 2's 'content' is a number"),
        ([USER, {"role": "assistent", "content": "a"}], "unknown 'role' 'assistent': did you mean 'assistant'"),
        ([{"from": "alien", "value": "x"}], "message 1 has the unknown 'from' 'alien'"),
        ([USER, {"role": "assistant", "content": "a", "tool_calls": [{}]}], "'tool_calls' has a call without a 'name'"),
        ([{"content": "a"}], "message 1's 'role' is null"),
        (r'[{"role": "user", "content": "\ud800"}]', "'messages' is a string that is not JSON: half a character"),
        ("[" * 5000, "'messages' is a string that is not JSON: nested too deeply"),
        ('[{"role": "user", "role": "x"}]', "'messages' is a string that is not JSON: the key 'role' is there twice"),
        ([USER, {**CALL, "tool_calls": r'[{"name": "f", "arguments": {"x": "\ud800"}}]'}], "half a character"),
        ([USER, {**CALL, "tool_calls": [{"name": "f", "arguments": '{"x": NaN}'}]}], "NaN is not JSON"),
    ],
)
def test_a_bad_conversation_is_named(messages: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", SHAPES["messages"][0], "", {"messages": messages})
    with pytest.raises(Usage, match="line 3: ") as caught:
        read_records(path)
    assert message in caught.value.message


def test_all_bad_records_are_counted_and_the_first_five_shown(tmp_path: Path) -> None:
    bad = [{"text": ""}, '{"text" 1}', {"messages": []}, {"text": 3}, {"nothing": 1}, {"text": None}, "[]"]
    with pytest.raises(Usage) as caught:
        read_records(write(tmp_path / "a.jsonl", GOOD, *bad))
    for line in ("line 2:", "line 3, column 9:", "line 4:", "line 5:", "line 6:"):
        assert line in caught.value.message
    assert "line 7" not in caught.value.message
    assert caught.value.message.endswith("; and 2 more")
    assert "has the shape of 'messages', but line 1 that of 'text'" in caught.value.message


def test_bad_records_of_lists_and_tables_are_numbered(tmp_path: Path) -> None:
    with pytest.raises(Usage, match="record 2: 'text' is empty"):
        read_records(write(tmp_path / "a.json", [GOOD, {"text": ""}]))
    pq.write_table(pa.table({"text": ["a", "b", None], "score": [1.0, float("nan"), None]}), tmp_path / "a.parquet")
    with pytest.raises(Usage, match="record 3: of no known shape"):
        read_records(tmp_path / "a.parquet")
    with pytest.raises(Usage, match=r"a.json, line 3, column 2: not valid JSON: Expecting ',' delimiter"):
        read_records(write(tmp_path / "a.json", "[", ' {"text": "a"}', ' {"text": "b"}]'))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n \n\xef\xbb\xbf"[:3], "holds no records"),
        ("a.txt", b" \r\n\n", "holds no records"),
        ("a.json", b"", "is empty"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b"7", "neither a JSON list of records nor JSON Lines"),
        ("a.json", b'{"data": []}', "is one JSON object, not a list of records"),
        ("a.parquet", b"PAR1 no, it is not", "not a Parquet file that can be read"),
        ("a.parquet.gz", b"", "is packed Parquet, which is not read: unpack it"),
        ("a.yaml", b"text: a\n", r"not a kind of data file that can be read \(.yaml\)"),
        ("a.xlsx", b"PK", "is a spreadsheet, which is not read: save it as CSV"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "is an archive, which is not read: unpack it"),
        ("a.jsonl.gz", b"\x1f\x8b\x08\x00cut", "cannot be unpacked"),
        ("a.csv", b"text,text\na,b\n", "no header of column names, each there once"),
        ("a.csv", b"text,id\na\n", "line 2: has 1 fields, and the header 2"),
        ("a.csv", b'text,id\n"a,1\n', "line 2: not valid CSV: unexpected end of data"),
        ("a", b'{"text": "a"}', "it has no suffix"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "is not UTF-8 .byte 0xe9 on line 2"),
        ("a.txt", "\ufeffhi".encode("utf-16-le") + b"\x00", "begins as UTF-16 and is none"),
        ("a.txt", "hi there".encode("utf-16-le"), "UTF-16 or UTF-32 without a byte-order mark"),
        ("b.txt", "hi there".encode("utf-16-be"), "UTF-16 or UTF-32 without a byte-order mark"),
        ("a.jsonl", '{"text": "hi"}'.encode("utf-32-le"), "UTF-16 or UTF-32 without a byte-order mark"),
    ],
)
def test_a_file_that_cannot_be_data_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Usage, match=message):
        read_records(tmp_path / name)


def test_what_is_not_there_is_not_found_and_never_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    for missing in ("chat.jsonl", "examples/chat.jsonl", "a/b/c", "../x", "/no/such", "data/table.CSV"):
        with pytest.raises(NotFound, match="does not exist"):
            read_records(missing)
    with pytest.raises(Usage, match="is a folder without texts"):
        read_records(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(Usage, match="not a file"):
        read_records(tmp_path / "pipe.jsonl")


def test_a_hub_data_set_is_read_by_split(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"text": "a", "n": 1}, {"text": "b", "n": None}])
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: asked.append((name, split)) or rows)
    monkeypatch.chdir(tmp_path)
    found = read_records("org/name.v2:validation")
    assert (found.count, found.unit, found.path) == (2, "record", "org/name.v2:validation")
    assert found.sha256.startswith("sha256:")
    assert read_records("org/name").records == found.records
    assert asked == [("org/name.v2", "validation"), ("org/name", "train")]


@pytest.mark.parametrize(
    ("error", "kind"),
    [("DatasetNotFoundError", NotFound), ("DataFilesNotFoundError", Usage), (ConnectionError, HubFailure)],
)
def test_a_hub_data_set_that_fails(error: Any, kind: type[StackctlError], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: Any, **__: Any) -> None:
        raise (getattr(datasets.exceptions, error) if isinstance(error, str) else error)("no")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind):
        read_records("org/no-such")


ROWS = [{"question": "007?", "answer": 'NA, "he" said\n海'}, {"question": "q", "answer": "a"}]


def _csv(separator: str) -> str:
    cell = '"NA, ""he"" said\n海"'
    return f"question{separator}answer{separator}note\n007?{separator}{cell}{separator}\nq{separator}a{separator}x\n"


PEOPLE_HAVE: dict[str, bytes] = {
    "a.csv": _csv(",").encode(),
    "semicolons.csv": _csv(";").encode(),
    "a.tsv": _csv("\t").encode(),
    "crlf.csv": _csv(",").replace("\n", "\r\n").replace("said\r\n", "said\n").encode(),
    "list.jsonl": json.dumps(ROWS, indent=1).encode(),
    "a.ndjson": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.jsonlines": "\n".join(map(json.dumps, ROWS)).encode(),
    "a.jsonl.gz": gzip.compress("\n".join(map(json.dumps, ROWS)).encode()),
    "a.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "a.csv.bz2": bz2.compress(_csv(",").encode()),
    "wide.jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode("utf-16"),
    "wide.csv": _csv(",").encode("utf-16"),
}


@pytest.mark.parametrize("name", PEOPLE_HAVE)
def test_files_as_people_have_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(PEOPLE_HAVE[name])
    found = read_records(tmp_path / name)
    assert (found.format, found.count) == ("question", 2)
    assert [record.messages for record in found.records if isinstance(record, ChatRecord)] == [
        [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}] for row in ROWS
    ]


def test_a_folder_of_texts_is_a_document_for_each(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.md").write_text("# Two\n\nmore\n")
    (tmp_path / "one.txt").write_text("One.\n\nStill one.")
    found = read_records(tmp_path)
    assert found.records == [TextRecord(1, "# Two\n\nmore"), TextRecord(2, "One.\n\nStill one.")]
    assert found.unit == "file"
    before = found.sha256
    (tmp_path / "one.txt").write_text("Another.")
    assert read_records(tmp_path).sha256 != before
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(Usage, match=r"file 2: empty\.txt is empty"):
        read_records(tmp_path)
    (tmp_path / "chat.jsonl").write_text("{}")
    with pytest.raises(Usage, match=r"is a folder with \.jsonl in it"):
        read_records(tmp_path)


SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
PAIR = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"prompt": "q", "response": "a"}, PAIR),
        ({"question": "q", "answer": "a"}, PAIR),
        ({"query": "q", "response": "a"}, PAIR),
        ({"id": 1, "system_prompt": "s", "question": "q", "response": "a"}, [SYSTEM, *PAIR]),
        ({"instruction": "q", "context": "", "response": "a"}, PAIR),
        ({"instruction": "q", "context": "about", "output": "a"}, [{"role": "user", "content": "q\n\nabout"}, PAIR[1]]),
        ({"instruction": "q", "input": "about", "response": "a"}, [{"role": "user", "content": "q\n\nabout"}, PAIR[1]]),
        (
            {"instruction": "q", "input": "", "context": "about", "output": "a"},
            [{"role": "user", "content": "q\n\nabout"}, PAIR[1]],
        ),
        ({"conversation": PAIR}, PAIR),
        ({"messages": json.dumps(PAIR)}, PAIR),
        ({"messages": PAIR, "system": "s"}, [SYSTEM, *PAIR]),
        ({"messages": [SYSTEM, *PAIR], "system": "s"}, [SYSTEM, *PAIR]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
            [SYSTEM, *PAIR],
        ),
        ({"question": "q", "answer": "a", "system_prompt": "s"}, [SYSTEM, *PAIR]),
        ({"instruction": "q", "output": "a", "system": "s", "history": [["q", "a"]]}, [SYSTEM, *PAIR, *PAIR]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, PAIR[1]]}, PAIR),
    ],
)
def test_what_stands_beside_a_conversation_belongs_to_it(record: Any, messages: Any, tmp_path: Path) -> None:
    (found,) = read_records(write(tmp_path / "a.jsonl", record)).records
    assert isinstance(found, ChatRecord)
    assert found.messages == messages


def test_turns_and_records_that_are_not_to_be_learned(tmp_path: Path) -> None:
    for flag in ({"weight": 0}, {"train": False}, {"training": False}, {"loss": False}):
        first = [PAIR[0], {**PAIR[1], **flag}]
        (found,) = read_records(write(tmp_path / "a.jsonl", {"messages": [*first, *PAIR], "system": "s"})).records
        assert isinstance(found, ChatRecord)
        assert [found.is_learned(position) for position in range(5)] == [False, False, False, False, True]
    half = {"messages": [PAIR[0], {**PAIR[1], "weight": 0.5}]}
    with pytest.raises(Usage, match=r"message 2's 'weight' is 0\.5: a turn is learned"):
        read_records(write(tmp_path / "a.jsonl", half))
    good, bad = ({"prompt": "q", "completion": "a", "label": label} for label in (True, False))
    found = read_records(write(tmp_path / "a.jsonl", good, bad, bad))
    assert found.count == 1
    (note,) = found.notes  # and none that says that the label means nothing
    assert "2 records with 'label': false" in note


def test_keys_that_mean_nothing_here_are_named_once_with_their_count(tmp_path: Path) -> None:
    known = {"messages": PAIR, "images": ["a.png"], "id": 3}
    found = read_records(write(tmp_path / "a.jsonl", known, known, {**known, "rejected": "b", "images": []}))
    (note,) = found.notes
    assert note.endswith("ignored: 'images' (2 records), 'rejected' (1 record)")
    asked = {"question": "q", "context": "about", "reasoning": "Hm.", "answer": "a"}
    (note,) = read_records(write(tmp_path / "a.jsonl", asked)).notes
    assert note.endswith("ignored: 'context' (1 record), 'reasoning' (1 record)")
    tool = {"role": "tool", "name": "f", "content": "1"}
    named = [{**PAIR[0], "name": "Bob"}, tool, {**PAIR[1], "prefix": True}, PAIR[0], {**PAIR[1], "mask": True}]
    (note,) = read_records(write(tmp_path / "a.jsonl", {"messages": named})).notes
    ignored = ", ".join(f"'messages[].{key}' (1 record)" for key in ("mask", "name", "prefix"))
    assert note.endswith(f"ignored: {ignored}")


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"instruction": "q", "input": "one", "context": "two", "output": "a"}, "has an 'input' and a 'context'"),
        ({"question": "q", "answer": "a", "system": "one", "system_prompt": "two"}, "has two system messages"),
    ],
)
def test_of_two_things_of_one_meaning_neither_is_dropped(record: Any, why: str, tmp_path: Path) -> None:
    with pytest.raises(Usage, match=why):
        read_records(write(tmp_path / "a.jsonl", record))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(Usage, match="two columns called 'text'"):
        read_records(tmp_path / "a.parquet")


def test_fields_that_only_other_rows_of_a_table_have_are_absent(tmp_path: Path) -> None:
    def row(arguments: Any, **more: Any) -> Any:
        call = {"function": {"name": "f", "arguments": arguments}}
        return {
            "messages": [PAIR[0], {"role": "assistant", "content": None, "tool_calls": [call]}, {**PAIR[1], **more}]
        }

    pq.write_table(pa.Table.from_pylist([row({"a": "x"}), row({"b": "y"}, weight=0.0)]), tmp_path / "a.parquet")
    records = [record for record in read_records(tmp_path / "a.parquet").records if isinstance(record, ChatRecord)]
    calls = [record.messages[1]["tool_calls"][0]["function"]["arguments"] for record in records]
    assert calls == [{"a": "x"}, {"b": "y"}]
    assert [sorted(record.muted) for record in records] == [[], [2]]
