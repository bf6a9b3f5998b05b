"""Prompts from a file: every kind of data file asks what JSON Lines ask."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stackctl.core.errors import Usage
from stackctl.engine.records.prompt_files import read_prompt_file

SAID = [{"role": "user", "content": 'Who, "I"?'}, {"role": "assistant", "content": "You."}]
ASKED = [
    ({"messages": SAID, "tools": [{"type": "function", "function": {"name": "f"}}]}, 'Who, "I"?'),
    ({"conversations": [{"from": "human", "value": "Sea;\nor shore?"}, {"from": "gpt", "value": "Sea."}]}, None),
    ({"system": "Be brief.", "prompt": "[1, 2] are two\tnumbers; are they?", "completion": "Yes."}, None),
    ({"instruction": "Add.", "input": "1 and 2", "output": "3"}, "Add.\n\n1 and 2"),
]


def _write_line(path: Path, record: dict[str, Any]) -> Path:
    path.write_text(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize(("record", "text"), ASKED)
def test_a_table_of_records_is_a_file_of_prompts(record: dict[str, Any], text: str | None, tmp_path: Path) -> None:
    """Every kind of data file, with conversations and tools as they are and as JSON text, asks what JSON Lines ask."""
    flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
    wanted = read_prompt_file(_write_line(tmp_path / "a.jsonl", record))
    assert text is None or wanted[0].text == text
    _write_line(tmp_path / "flat.jsonl", flat)
    (tmp_path / "flat.json").write_text(json.dumps([flat]))
    (tmp_path / "a.ndjson.gz").write_bytes(gzip.compress((tmp_path / "flat.jsonl").read_bytes()))
    for name, one in (("a", record), ("flat", flat)):
        pq.write_table(pa.Table.from_pylist([one]), tmp_path / f"{name}.parquet")
    for name, separator in (("a.csv", ","), ("semicolons.csv", ";"), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as stream:
            csv.writer(stream, delimiter=separator).writerows([list(flat), list(flat.values())])
    (tmp_path / "a.csv.bz2").write_bytes(bz2.compress((tmp_path / "a.csv").read_bytes()))
    kinds = [path for path in tmp_path.iterdir() if path.is_file() and path.name != "a.jsonl"]
    assert len(kinds) == 9
    for path in kinds:
        found = read_prompt_file(path)
        assert [replace(prompt, place="") for prompt in found] == [replace(prompt, place="") for prompt in wanted], path
        assert re.fullmatch(rf"{re.escape(str(path))}, (line [12]|record 1)", found[0].place)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "id,note\n1,x\n", "line 2: no prompt (it has 'id', 'note')"),
        ("a.csv", "messages\nWho?\n", "line 2: 'messages' is a string, not a list of messages"),
        ("a.tsv", "prompt\tprompt\nx\ty\n", "no header of column names, each there once"),
        ("a.parquet", "PAR1", "is not a Parquet file that can be read"),
        ("a.jsonl", '{"messages": "[{]"}', "line 1: 'messages' is a string that is not JSON"),
    ],
)
def test_a_table_without_prompts_is_refused_by_what_it_is(name: str, content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(Usage) as raised:
        read_prompt_file(tmp_path / name)
    assert said in raised.value.message
