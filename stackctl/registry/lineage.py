"""Who was trained on whom: every version of every adapter, removed ones too, as one forest. Pure but for reading.

A version hangs below what it was trained on last; where it stands on more than that and what that stands on in turn,
its line says on what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stackctl.core.schema import Adapter, AdapterVersion, Removed
from stackctl.registry.store import Registry

_DEEPEST = 24
"""Levels that are indented; a longer chain goes on below one another."""


@dataclass(frozen=True, slots=True)
class LineageNode:
    """One version. ``trained_on`` are pinned terms (``style@1:0.7``); ``freed``: only its number is still known."""

    label: str
    base: str | None
    trained_on: tuple[str, ...] = ()
    removed: bool = False
    freed: bool = False
    facts: str = ""

    @property
    def parent(self) -> str | None:
        """What it was trained on last, as ``style@1``; None on a bare base."""
        return self.trained_on[-1].partition(":")[0] if self.trained_on else None

    def json(self) -> dict[str, Any]:
        return {
            "name": self.label, "base": self.base, "trained_on": list(self.trained_on), "parent": self.parent,
            "removed": self.removed, "freed": self.freed,
        }  # fmt: skip


def read_lineage(registry: Registry, adapters: Iterable[Adapter] | None = None) -> list[LineageNode]:
    """Every version that a registry has or had, adapters in alphabetical order, versions in theirs.

    ``adapters`` are all that are registered, where they have been read already.
    """
    found: dict[str, LineageNode] = {}
    for name in registry.names(Removed):
        removed = registry.find_removed(name)
        for number in removed.given:
            label = f"{name}@{number.version}"
            found[label] = LineageNode(label, None, removed=True, freed=True)
        found |= {label: _node(label, version, removed=True) for label, version in removed.labelled().items()}
    for adapter in registry.adapters() if adapters is None else adapters:
        found |= {label: _node(label, version, removed=False) for label, version in adapter.labelled().items()}
    return sorted(found.values(), key=lambda node: _order(node.label))


def _node(label: str, version: AdapterVersion, *, removed: bool) -> LineageNode:
    loss = f", loss {version.run.loss:.3f}" if version.run else ""
    return LineageNode(
        label, version.base, tuple(version.trained_on), removed,
        facts=f"rank {version.lora.r}{loss}, {version.created[:10]}",
    )  # fmt: skip


def _order(label: str) -> tuple[str, int]:
    name, _, number = label.partition("@")
    return name, int(number) if number.isdecimal() else 0


def relatives(nodes: Sequence[LineageNode], labels: Iterable[str]) -> list[LineageNode]:
    """Some versions with all that they stand on, however far down, and all that stands on them."""
    foundations = {one.label: [term.partition(":")[0] for term in one.trained_on] for one in nodes}
    upon: dict[str, list[str]] = {}
    for label, below in foundations.items():
        for one in below:
            upon.setdefault(one, []).append(label)
    labels = list(labels)
    wanted = _below(foundations, labels) | _below(upon, labels)
    return [one for one in nodes if one.label in wanted]


def tree_lines(nodes: Sequence[LineageNode], bases: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """The forest line by line: what leads to a thing, its name, and what there is to say of it.

    Bases are the roots; a version whose foundation nobody knows hangs below that, and that below no base.
    """
    known = {one.label: one for one in nodes}
    children: dict[str, list[str]] = {base: [] for base in bases}
    lost: dict[str, list[str]] = {}
    for one in nodes:
        parent = one.parent if one.parent is not None else one.base
        if parent is None or (parent not in known and one.parent is not None):
            lost.setdefault(parent or one.label, [])
        if parent is not None:
            children.setdefault(parent, []).append(one.label)
    roots = [name for name in children if "@" not in name]
    reached = _below(children, [*roots, *lost])
    for one in nodes:  # what stands on itself, in files that somebody edited, is reached from nowhere
        if one.label not in reached:
            lost[one.label] = []
            children[str(one.parent)].remove(one.label)
            reached |= _below(children, [one.label])
    for root in roots:
        yield "", root, "base"
        yield from _draw(children, known, root)
    if lost:
        yield "", "without a base", ""
        yield from _draw({**children, "": sorted(lost, key=_order)}, known, "")


def _below(children: Mapping[str, list[str]], roots: Iterable[str]) -> set[str]:
    """Some things and everything that hangs below them."""
    reached, pending = set[str](), list(roots)
    while pending:
        label = pending.pop()
        if label not in reached:
            reached.add(label)
            pending += children.get(label, ())
    return reached


def _draw(
    children: Mapping[str, list[str]], known: Mapping[str, LineageNode], root: str
) -> Iterator[tuple[str, str, str]]:
    """What hangs below a root, depth first and without recursion: nobody limits how long a chain grows."""
    pending = [("", label, 1) for label in reversed(children.get(root, []))]
    last = {labels[-1] for labels in children.values() if labels}
    while pending:
        indent, label, depth = pending.pop()
        yield indent + ("└── " if label in last else "├── "), label, _remark(known.get(label), known)
        inner = indent + ("    " if label in last else "│   ") if depth < _DEEPEST else indent
        pending += [(inner, child, depth + 1) for child in reversed(children.get(label, []))]


def _remark(node: LineageNode | None, known: Mapping[str, LineageNode]) -> str:
    if node is None:
        return "not in this registry"
    parts = [node.facts] if node.facts else []
    if node.removed:
        parts.append("removed, and its weights are gone" if node.freed else "removed")
    if node.parent is not None:
        under = known.get(node.parent)
        if node.trained_on != (*(under.trained_on if under else ()), node.parent):
            parts.append("on " + "+".join(node.trained_on))
    return "; ".join(parts)
