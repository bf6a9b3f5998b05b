"""``ls --tree``: which version was trained on which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_base, make_registry, register

from stackctl.registry.lineage import LineageNode as Node
from stackctl.registry.lineage import relatives, tree_lines
from stackctl.registry.store import Registry


@pytest.fixture
def family(tmp_path: Path, run: Callable[..., Any]) -> Registry:
    """style in two versions, instruct on the first, judge on both together, and tone with a weight."""
    registry = make_registry(tmp_path / "registry", make_base("tiny"), make_base("other", "sha256:" + "0" * 64))
    register(registry, "style")
    register(registry, "style", seed=1)
    register(registry, "instruct", ["style@1"], seed=2)
    register(registry, "judge", ["style@1", "instruct@1"], seed=3)
    register(registry, "tone", ["style@1", "instruct@1:0.5"], seed=4)
    return registry


def shown(text: str) -> list[str]:
    """The tree without what is said of each thing."""
    return [line.split("  rank")[0].rstrip() for line in text.splitlines()]


def test_a_version_hangs_below_what_it_was_trained_on_last(family: Registry, run: Callable[..., Any]) -> None:
    text = run("ls", "--tree").out
    assert shown(text) == [
        "other  base",
        "tiny  base",
        "├── style@1",
        "│   └── instruct@1",
        "│       ├── judge@1",
        "│       └── tone@1",
        "└── style@2",
    ]
    remarks = dict(line.lstrip("│├└─ ").split("  ", 1) for line in text.splitlines())
    assert remarks["tone@1"] == "rank 2, 2026-01-31; on style@1+instruct@1:0.5"
    assert remarks["judge@1"] == "rank 2, 2026-01-31"  # style@1+instruct@1 is what instruct@1 stands on, and itself


def test_removed_versions_stay_in_the_tree_until_nothing_is_known_of_them(
    family: Registry, run: Callable[..., Any]
) -> None:
    run("rm", "tone")
    run("rm", "style@2")
    text = run("ls", "--tree").out
    assert "tone@1  rank 2, 2026-01-31; removed; on style@1+instruct@1:0.5" in text
    assert "└── style@2  rank 2, 2026-01-31; removed" in text
    run("gc")
    text = run("ls", "--tree").out
    assert shown(text)[-3:] == ["without a base", "├── style@2  removed, and its weights are gone",
                                "└── tone@1  removed, and its weights are gone"]  # fmt: skip
    lineage = {one["name"]: one for one in run("ls", "--tree", "--json").json["lineage"]}
    assert [name for name, one in lineage.items() if one["freed"]] == ["style@2", "tone@1"]
    assert lineage["instruct@1"] == {
        "name": "instruct@1", "base": "tiny", "trained_on": ["style@1"], "parent": "style@1", "removed": False,
        "freed": False,
    }  # fmt: skip


def test_json_without_tree_is_what_it_was(family: Registry, run: Callable[..., Any]) -> None:
    plain, tree = run("ls", "--json").json, run("ls", "--tree", "--json").json
    assert {key: value for key, value in tree.items() if key != "lineage"} == plain


def test_an_empty_registry_has_no_tree(run: Callable[..., Any]) -> None:
    run("init")
    assert run("ls", "--tree").out == run("ls").out


def names(nodes: list[Node], bases: list[str] | None = None) -> list[str]:
    return [f"{guide}{name}" for guide, name, _ in tree_lines(nodes, bases or [])]


def test_what_stands_on_itself_is_drawn_once() -> None:
    """Nobody can register a circle, but somebody may edit one."""
    circle = [
        Node("a@1", "tiny", ("c@1",)),
        Node("b@1", "tiny", ("a@1",)),
        Node("c@1", "tiny", ("b@1",)),
    ]
    alone = Node("d@1", "tiny", ("d@1",))
    assert names([*circle, alone, Node("e@1", "tiny")], ["tiny"]) == [
        "tiny", "└── e@1", "without a base", "├── a@1", "│   └── b@1", "│       └── c@1", "└── d@1",
    ]  # fmt: skip


def test_an_unknown_foundation_and_an_unregistered_base_are_named() -> None:
    nodes = [Node("a@2", "tiny", ("gone@7:0.5",)), Node("b@1", "vanished")]
    assert list(tree_lines(nodes, [])) == [
        ("", "vanished", "base"), ("└── ", "b@1", ""), ("", "without a base", ""),
        ("└── ", "gone@7", "not in this registry"), ("    └── ", "a@2", "on gone@7:0.5"),
    ]  # fmt: skip


def test_every_version_is_there_once_however_long_the_chain() -> None:
    nodes = [Node("a@1", "tiny"), *(Node(f"a@{n}", "tiny", (f"a@{n - 1}",)) for n in range(2, 3001))]
    lines = list(tree_lines(nodes, ["tiny"]))
    assert [name for _, name, _ in lines] == ["tiny", *(f"a@{n}" for n in range(1, 3001))]
    assert max(len(guide) for guide, _, _ in lines) < 120


def test_relatives_are_what_one_stands_on_and_what_stands_on_one() -> None:
    nodes = [
        Node("a@1", "tiny"), Node("b@1", "tiny", ("a@1",)), Node("c@1", "tiny", ("x@1", "b@1:0.5")),
        Node("x@1", "tiny"), Node("d@1", "tiny", ("a@1", "c@1")), Node("other@1", "tiny", ("a@1",)),
        Node("z@1", "tiny", ("z@1",)),
    ]  # fmt: skip
    assert [one.label for one in relatives(nodes, ["c@1"])] == ["a@1", "b@1", "c@1", "x@1", "d@1"]
    assert [one.label for one in relatives(nodes, ["z@1"])] == ["z@1"]


def test_remarks_are_cut_to_the_screen_and_names_are_not(
    family: Registry, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    lines = run("ls", "--tree").out.splitlines()
    assert max(map(len, lines)) == 40
    assert "│       └── tone@1  rank 2, 2026-01-31;…" in lines
    monkeypatch.setenv("COLUMNS", "10")
    assert "│       └── tone@1  …" in run("ls", "--tree").out.splitlines()
