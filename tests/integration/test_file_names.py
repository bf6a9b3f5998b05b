"""Names of files as file systems allow them, and as they do not: blanks, breaks, accents in both forms, too long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from tiny_registry import CHAT

NAMES = {
    "blanks": " a  b ",
    "composed": unicodedata.normalize("NFC", "café"),
    "decomposed": unicodedata.normalize("NFD", "café"),
    "Chinese": "适配器",
    "a line break": "new\nline",
    "quotes": "quo'te\"s",
    "a backslash": "e\\s",
    "signs of YAML": "{b}: [c] #&*!%@`|>",
    "signs of shells": "$HOME;~|*?",
    "a number": "1e5",
    "as long as can be": "x" * 255,
}
EVERYTHING = "ä ä '\"\n{c}: #$\\"
TOO_LONG = {"a name": "y" * 256, "a path": "dir/" * 1200 + "end"}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_folder_of_any_name_is_registered_and_said_as_it_is(filled_registry, run, tmp_path, name):
    folder = write_checkpoint(tmp_path / name, seed=7)
    copied = run("add", "copied", folder, "--base", "tiny", "--json").json
    linked = run("add", "linked", f"./{name}", "--base", "tiny", "--link", "--json").json
    assert linked["path"] == str(folder)
    assert linked["digest"] == copied["digest"]
    assert run("inspect", f"./{name}", "--json").json["path"] == str(folder)
    listed = {a["name"]: a["versions"][0]["path"] for a in run("ls", "--json").json["adapters"]}
    assert listed["linked"] == str(folder)
    problems = run("verify", "--json", code=5).json["problems"]
    assert {problem["what"] for problem in problems} == {"tiny", "other"}, "whose folders never were"


def test_both_forms_of_an_accent_are_two_folders(filled_registry, run, tmp_path):
    folders = [
        write_checkpoint(tmp_path / NAMES[form], seed=seed) for seed, form in enumerate(("composed", "decomposed"))
    ]
    if len({folder.stat().st_ino for folder in folders}) == 1:
        return  # a file system that takes them for one, as those of Apple do
    added = [run("add", "accent", folder, "--base", "tiny", "--link", "--json").json for folder in folders]
    assert [one["path"] for one in added] == [str(folder) for folder in folders]
    assert added[0]["digest"] != added[1]["digest"]


def test_a_name_that_is_no_text(filled_registry, tmp_path):
    """Through the installed command, which gets bytes."""
    name = b"caf\xe9"
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    write_checkpoint(folder, seed=8)
    command = [sys.executable, "-m", "stackctl", "add", "bytes", folder, "--base", "tiny"]
    refused = subprocess.run([*command, "--link"], capture_output=True, cwd=tmp_path)
    assert refused.returncode == 2
    assert b"is not Unicode" in refused.stderr
    assert b"hint: leave out --link" in refused.stderr
    assert filled_registry.find_adapter("bytes") is None
    done = subprocess.run([*command, "--json"], capture_output=True, cwd=tmp_path, check=True)
    assert json.loads(done.stdout)["digest"] == filled_registry.find_adapter("bytes").newest().digest


COMMANDS = [
    "add new PATH --base tiny", "add new PATH --base tiny --link", "inspect ./PATH", "inspect style --output PATH",
    "export style --format peft --out PATH", "train new --base tiny --data PATH", "train new --config PATH",
    "train new --base tiny --data d.jsonl --eval-data PATH", "generate style -p x --output PATH",
    "generate style --prompts PATH", "compare style tone -p x --output PATH", "eval style --data PATH",
    "verify --repair --from PATH", "base add new PATH", "init PATH", "ls --registry PATH",
]  # fmt: skip


@pytest.mark.parametrize("path", TOO_LONG.values(), ids=TOO_LONG)
def test_a_path_that_is_too_long_is_one_short_error_and_leaves_nothing(filled_registry, run, tmp_path, path):
    (tmp_path / "d.jsonl").write_text('{"text": "the sea"}\n')
    before = sorted(tmp_path.rglob("*"))
    for command in COMMANDS:
        ran = run(*(word.replace("PATH", path) for word in command.split()), code=2)
        error, hint = ran.err.splitlines()[-2:]
        assert error.startswith("error: file name too long ("), command
        assert len(error) < 400, command
        assert hint == "hint: choose a shorter path", command
        assert sorted(tmp_path.rglob("*")) == before, command


def test_names_that_the_engine_reads_and_writes(h, tmp_path):
    """Training, answering and exporting, once, with files whose names are as bad as can be."""
    h.add("style", seed=1, r=2, target_modules=["q_proj"])
    data = tmp_path / f"{EVERYTHING}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in CHAT))
    (tmp_path / f"{EVERYTHING}.txt").write_text("Hi.\nWho?\n")
    h.run("train", "new", "--base", "tiny", "--data", data, "--max-steps", 1, "--rank", 2, "-q")
    assert Path(h.registry.find_adapter("new").newest().data.path).name == data.name
    words = ("--prompts", f"{EVERYTHING}.txt", "--output")
    h.run("generate", "style+new", *words, f"{EVERYTHING}.jsonl.txt", "--max-new-tokens", 2)
    assert (tmp_path / f"{EVERYTHING}.jsonl.txt").stat().st_size
    h.run("compare", "style", "new", "-p", "Hi.", "--max-new-tokens", 2, "--output", f"{EVERYTHING}.html")
    assert (tmp_path / f"{EVERYTHING}.html").is_file()
    out = h.run("export", "style+new", "--format", "peft", "--out", EVERYTHING, "--json").json
    assert out["path"] == str(tmp_path / EVERYTHING)
    assert h.run("add", "sum", EVERYTHING, "--base", "tiny", "--json").json["adapter"] == "sum"
