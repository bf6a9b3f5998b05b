"""The page that walks through one run names files and functions that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "explanation" / "one-run.md").read_text(encoding="utf-8")
FILES = sorted(set(re.findall(r"`([a-z_/]+\.py)`", PAGE)))
WORDS = sorted({w for w in re.findall(r"`([A-Za-z_]+)`", PAGE) if "_" in w or w[0].isupper()} - {"_prepare"})


def defined(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}


@pytest.mark.parametrize("file", FILES)
def test_its_files_exist(file: str) -> None:
    assert (ROOT / "stackctl" / file).is_file()


def test_its_functions_exist_in_one_of_them() -> None:
    known = set().union(*(defined(ROOT / "stackctl" / file) for file in FILES))
    assert not [word for word in WORDS if word not in known]
    assert len(WORDS) > 30


@pytest.mark.parametrize("name, file", re.findall(r"`([A-Za-z_]+)`\s*(?:of|\()\s*`([a-z_/]+\.py)`", PAGE))
def test_each_stands_where_the_page_says(name: str, file: str) -> None:
    assert name in defined(ROOT / "stackctl" / file)


LONGEST = 6
"""Parameters of a function on the road of a training."""


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith(("cli/train", "jobs/job", "engine/training/"))])
def test_no_function_on_the_road_has_many_parameters(file: str) -> None:
    tree = ast.parse((ROOT / "stackctl" / file).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([n for n in names if n != "self"]) <= LONGEST, node.name
