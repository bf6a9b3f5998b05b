"""What --json says is what docs/reference/json.md says that it says."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from checkpoints import make_base

from stackctl.registry.base_entries import save_base

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "json.md"


@pytest.mark.parametrize(
    "words",
    [["ls"], ["base", "ls"], ["use", "both"], ["verify"], ["rm", "both"], ["rm", "tone", "--dry-run"], ["gc"],
     ["gc", "--cache", "--runs", "--dry-run"], ["base", "rm", "spare"]],
    ids=" ".join,
)  # fmt: skip
def test_every_key_is_documented_and_every_documented_key_is_there(filled_registry, run, words):
    save_base(filled_registry, make_base("spare"))
    run("compose", "style+instruct", "--name", "both")
    named = " ".join(words[: 2 if words[0] == "base" else 1])
    (row,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| `{named}` |")]
    keys = re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)|;.*", "", row.split("|")[2]))
    document = run(*words, "--json", code=None).json
    assert sorted(document) == sorted([*keys, "schema"])


def test_what_is_in_the_lists_of_verify_and_gc_is_documented(filled_registry, run):
    shutil.rmtree(filled_registry.root / "weights" / "tone")
    run("rm", "foreign")
    problem = next(p for p in run("verify", "--json", code=5).json["problems"] if p["what"] == "tone@1")
    (freed,) = run("gc", "--json").json["freed"]
    assert list(problem) == ["what", "message", "restore"]
    assert list(freed) == ["what", "why", "path", "bytes"]
    kept = run("gc", "--json").json["kept"]
    section = PAGE.read_text().partition("## verify, gc")[2].partition("\n## ")[0]
    row = next(line for line in PAGE.read_text().splitlines() if line.startswith("| `gc` |"))
    assert not [key for key in {*problem, *freed, *kept} if f"`{key}`" not in section + row]
