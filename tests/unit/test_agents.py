"""AGENTS.md is true to the files: the rooms that it lists are those that there are, in an order that imports keep."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
ROOMS = re.findall(r"^\| `stackctl/([a-z]+)/`", PAGE, re.MULTILINE)


def imported(room: str) -> set[str]:
    """The rooms that a room's modules import, anywhere in them, but for types alone."""
    found = set()
    for path in (ROOT / "stackctl" / room).rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        typing = {n for i in ast.walk(tree) if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
                  for n in ast.walk(i)}  # fmt: skip
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stackctl.") and node not in typing:
                found.add(str(node.module).split(".")[1])
    return found - {room}


def test_it_lists_every_room_once() -> None:
    here = {path.name for path in (ROOT / "stackctl").iterdir() if (path / "__init__.py").is_file()}
    assert sorted(ROOMS) == sorted(here)


def test_imports_point_from_a_room_to_those_before_it() -> None:
    for number, room in enumerate(ROOMS):
        assert imported(room) <= set(ROOMS[:number]), room


def test_the_pages_that_it_names_exist() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", PAGE)
    assert links
    assert all((ROOT / link).exists() for link in links)
