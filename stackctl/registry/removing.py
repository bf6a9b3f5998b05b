"""Removing in two steps: ``rm`` takes a thing out of the registry, ``gc`` frees what no entry needs.

A removed version moves from ``adapters/NAME.yaml`` to ``removed/NAME.yaml`` and keeps its weights, so that a stack that
comes back by a merge still finds it by its digest. Its number stays given for ever.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.expressions import BASE, Reference, parse_expression
from stackctl.core.schema import Adapter, AdapterVersion, GivenNumber, Removed, Stack
from stackctl.lora.checkpoint import CONFIG
from stackctl.registry.changing import Changes
from stackctl.registry.resolving import foundations
from stackctl.storage import files


@dataclass(frozen=True)
class Removal:
    """What ``rm`` took out, or would. ``bytes`` are those of its weights, which stay until ``gc``."""

    removed: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Freed:
    """One thing that ``gc`` freed, or would."""

    what: str
    why: str
    path: str
    bytes: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


class Removals(Changes):
    """Removing and freeing."""

    def remove(self, text: str, *, dry_run: bool = False) -> Removal:
        """Remove a stack, an adapter or one version of it.

        Raises:
            NotFound: it is not there.
            Usage: something stands on it.
        """
        with contextlib.nullcontext() if dry_run else self.lock():
            if "@" not in text and text != BASE and (stack := self.find_stack(text)):
                path = self._entry_path(Stack, stack.name)
                removal = Removal((stack.name,), 0)
                if not dry_run:
                    path.unlink()
                    files.fsync_directory(path.parent)
                    if self.settings().current == stack.name:
                        self._set_current(None)
                return removal
            terms = parse_expression(text)
            if len(terms) != 1 or terms[0].weight != 1:
                raise Usage(f"'{text}' is not one adapter or stack", hint="name one: stackctl rm style@1")
            return self._remove_versions(terms[0].reference, dry_run)

    def _remove_versions(self, reference: Reference, dry_run: bool) -> Removal:
        if not self._entry_path(Adapter, reference.name).is_file() and self.find_base(reference.name):
            raise Usage(f"'{reference.name}' is a base", hint=f"stackctl base rm {reference.name}")
        adapter = self.resolve_adapter(reference).adapter
        going = [v for v in adapter.versions if reference.version in (None, v.version)]
        labels = {f"{adapter.name}@{v.version}" for v in going}
        if users := self._standing_on(labels):
            raise Usage(
                f"{' and '.join(sorted(labels))} cannot be removed: {', '.join(users)} depend on it",
                hint=f"begin with what nothing depends on: stackctl rm {self._free_user(users)}",
            )
        own = (self._own_folder(adapter.name, v) for v in going)
        removal = Removal(
            tuple(f"{adapter.name}@{v.version}" for v in going), sum(files.tree_bytes(f) for f in own if f)
        )
        if not dry_run:
            self._move_out(adapter, going)
        return removal

    def _move_out(self, adapter: Adapter, going: list[AdapterVersion]) -> None:
        """Into the removed ones first, then out of the entry: what a kill leaves in both is registered."""
        before = self.find_removed(adapter.name)
        given = {g.version: g for g in before.given}
        given |= {v.version: GivenNumber(version=v.version, digest=v.digest) for v in adapter.versions}
        gone = {v.version: v for v in before.versions} | {v.version: v for v in going}
        self._write(
            Removed(
                name=adapter.name,
                given=[given[number] for number in sorted(given)],
                versions=[gone[number] for number in sorted(gone)],
            )
        )
        staying = [v for v in adapter.versions if v not in going]
        path = self._entry_path(Adapter, adapter.name)
        if staying:
            self._write(msgspec.structs.replace(adapter, versions=staying))
        else:
            path.unlink()
            files.fsync_directory(path.parent)

    def _own_folder(self, name: str, version: AdapterVersion) -> Path | None:
        """A version's folder below ``weights/``; None for a link, whose files belong to somebody else."""
        folder = self.root / self.relative_weights_path(name, version.version)
        is_own = version.path == self.relative_weights_path(name, version.version)
        return folder if is_own and folder.is_dir() else None

    def _standing_on(self, labels: set[str]) -> list[str]:
        users = [
            f"{adapter.name}@{version.version}"
            for adapter in self.adapter_rows()
            for version in adapter.versions
            if f"{adapter.name}@{version.version}" not in labels
            and any(str(term.reference) in labels for term in foundations(version))
        ]
        users += [
            stack.name
            for stack in self.stack_rows()
            if any(f"{m.adapter}@{m.version}" in labels for m in stack.members)
        ]
        return users

    def _free_user(self, users: list[str]) -> str:
        """One of them that can be removed at once: stacks can."""
        return next((user for user in reversed(users) if not self._standing_on({user})), users[-1])

    # -- freeing ------------------------------------------------------------------------------------------------

    def free(self, needed: Iterable[str] = (), *, dry_run: bool = False) -> list[Freed]:
        """Free the weights that no entry needs and what killed processes left.

        Args:
            needed: labels that something outside the entries stands on, such as unfinished training.

        Raises:
            Usage: an entry cannot be read, so that nobody knows what it needs; nothing is freed then.
        """
        freed = self._free_staging(dry_run)
        with contextlib.nullcontext() if dry_run else self.lock():
            live = {f"{a.name}@{v.version}": (a.name, v) for a in self.adapters() for v in a.versions}
            wanted = {str(term.reference) for _, version in live.values() for term in foundations(version)}
            wanted |= {f"{m.adapter}@{m.version}" for stack in self.stacks() for m in stack.members} | set(needed)
            kept = [version for _, version in live.values()]
            going: list[tuple[Removed, list[AdapterVersion]]] = []
            for removed in [self.find_removed(name) for name in self.names(Removed)]:
                labels = {v.version: f"{removed.name}@{v.version}" for v in removed.versions}
                staying = [v for v in removed.versions if labels[v.version] in wanted and labels[v.version] not in live]
                kept += staying
                if staying != removed.versions:
                    going.append((removed, staying))
            was_removed = {
                f"{removed.name}@{v.version}"
                for removed, staying in going
                for v in removed.versions
                if v not in staying
            }
            places = {self.weights_path(version) for version in kept}
            for folder in self._weights_without(places):
                label = f"{folder.parent.name}@{folder.name}"
                why = "removed" if label in was_removed else "never registered"
                freed.append(Freed(label, why, str(folder), files.tree_bytes(folder)))
            if dry_run:
                return freed
            for removed, staying in going:  # before their weights: what is half gone is nobody's
                self._write(msgspec.structs.replace(removed, versions=staying))
            names = set() if (self.root / "weights").is_symlink() else {*files.children(self.root / "weights")}
            for folder in self._weights_without(places):
                files.remove_tree(folder)
                names.add(folder.parent)
            for name in names:
                if name.name[0] != ".":
                    with contextlib.suppress(OSError):  # it is not empty
                        name.rmdir()
        return freed

    def _weights_without(self, places: set[Path]) -> list[Path]:
        """The folders ``weights/NAME/NUMBER`` in which no entry's checkpoint lies.

        ``weights`` may be a link to a larger disk; what lies behind it is freed only if it is a checkpoint, for who
        cloned a registry has not made that link. Links below it are not followed.
        """
        weights = self.root / "weights"
        inside = {parent for place in places for parent in (place, *place.parents)}
        names = [name for name in files.children(weights) if name.name[0] != "." and not name.is_symlink()]
        found = [f for name in names for f in files.children(name) if f.name.isdigit()]
        found = [f for f in found if f.is_dir() and f.resolve() not in inside]
        return [f for f in found if (f / CONFIG).is_file()] if weights.is_symlink() else found

    def _free_staging(self, dry_run: bool) -> list[Freed]:
        """What killed processes left anywhere in the registry."""
        left: list[Path] = []
        for folder, folders, names in os.walk(self.root):  # others add and remove meanwhile, which it takes lightly
            left += [Path(folder, name) for name in [*folders, *names] if name.startswith(files.STAGING_PREFIX)]
            folders[:] = [name for name in folders if not name.startswith(files.STAGING_PREFIX)]
        sizes = {path: files.tree_bytes(path) for path in left}
        swept = [p for parent in {p.parent for p in left} for p in files.sweep_staging(parent, dry_run=dry_run)]
        return [
            Freed(str(p.relative_to(self.root)), "left by a killed process", str(p), sizes.get(p, 0))
            for p in sorted(swept)
        ]
