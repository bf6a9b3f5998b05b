"""What ``gc`` frees: weights that no entry needs, unfinished runs, trackers' logs, and what is only a cache.

What is in a cache can be made again, so that it may go at any time: a run that reads it has its files open.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from stackctl.core.errors import Failed, Usage
from stackctl.core.schema import Removed
from stackctl.lora.checkpoint import CONFIG
from stackctl.registry.adapters import foundations
from stackctl.registry.base_models import converted_models
from stackctl.registry.export_cache import exported_adapters
from stackctl.registry.run_folders import RunFolder, run_folder, unfinished_runs
from stackctl.registry.store import Registry
from stackctl.storage import atomic, files
from stackctl.storage.paths import cache_root

_UNUSED_SECONDS = 30 * 24 * 3600
"""Tokenised data that no run asked for in so long is removed."""


@dataclass(frozen=True)
class Freed:
    """One thing that ``gc`` freed, or would."""

    what: str
    why: str
    path: str
    bytes: int


def free_weights(registry: Registry, needed: Iterable[str] = (), *, dry_run: bool = False) -> list[Freed]:
    """Free the weights that no entry needs and what killed processes left.

    Args:
        needed: labels that something outside the entries stands on, such as unfinished training.

    Raises:
        Usage: an entry cannot be read, so that nobody knows what it needs; nothing is freed then.
    """
    freed = _free_staging(registry, dry_run)
    with contextlib.nullcontext() if dry_run else registry.lock():
        live = {label: v for a in registry.adapters() for label, v in a.labelled().items()}
        wanted = {str(term.reference) for version in live.values() for term in foundations(version)}
        wanted |= {m.label for stack in registry.stacks() for m in stack.members} | set(needed)
        kept = list(live.values())
        entries: list[Removed] = []
        was_removed: set[str] = set()
        for removed in [registry.find_removed(name) for name in registry.names(Removed)]:
            labelled = removed.labelled()
            staying = [v for label, v in labelled.items() if label in wanted and label not in live]
            kept += staying
            if staying != removed.versions:
                entries.append(msgspec.structs.replace(removed, versions=staying))
                was_removed |= {label for label, v in labelled.items() if v not in staying}
        places = {registry.weights_path(version) for version in kept}
        places |= {_own_place(registry, label) for label in wanted}  # its entry is gone, and may come back
        for folder in unreferenced_weights(registry, places):
            label = f"{folder.parent.name}@{folder.name}"
            why = "removed" if label in was_removed else "never registered"
            freed.append(Freed(label, why, str(folder), files.tree_bytes(folder)))
        if dry_run:
            return freed
        try:  # before their weights: what is half gone is nobody's
            registry.write(*entries)
        except OSError as error:
            if not files.disk_is_full(error, registry.root):
                raise
            _remove_weights(registry, places)  # who looks for space has none for an entry
            registry.write(*entries)
        _remove_weights(registry, places)
    return freed


def _own_place(registry: Registry, label: str) -> Path:
    """Where a version's checkpoint lies when it is the registry's own."""
    name, _, number = label.partition("@")
    return registry.root.resolve() / registry.relative_weights_path(name, number)


def _remove_weights(registry: Registry, places: set[Path]) -> None:
    names = set() if (registry.root / "weights").is_symlink() else {*files.children(registry.root / "weights")}
    for folder in unreferenced_weights(registry, places):
        files.remove_tree(folder)
        names.add(folder.parent)
    for name in names:
        if name.name[0] != ".":
            with contextlib.suppress(OSError):  # it is not empty
                name.rmdir()


def unreferenced_weights(registry: Registry, places: set[Path]) -> list[Path]:
    """The folders ``weights/NAME/NUMBER`` in which no entry's checkpoint lies.

    ``weights`` may be a link to a larger disk; what lies behind it is freed only if it is a checkpoint, for who
    cloned a registry has not made that link. Links below it are not followed.
    """
    weights = registry.root / "weights"
    inside = {parent for place in places for parent in (place, *place.parents)}
    names = [name for name in files.children(weights) if name.name[0] != "." and not name.is_symlink()]
    found = [f for name in names for f in files.children(name) if f.name.isdigit()]
    found = [f for f in found if f.is_dir() and f.resolve() not in inside]
    return [f for f in found if (f / CONFIG).is_file()] if weights.is_symlink() else found


def _free_staging(registry: Registry, dry_run: bool) -> list[Freed]:
    """What killed processes left anywhere in the registry."""
    parents = set[Path]()
    for folder, folders, names in os.walk(registry.root):  # others add and remove meanwhile, which it takes lightly
        if any(name.startswith(atomic.STAGING_PREFIX) for name in [*folders, *names]):
            parents.add(Path(folder))
        folders[:] = [name for name in folders if not name.startswith(atomic.STAGING_PREFIX)]
    return [freed for parent in sorted(parents) for freed in _left_over(parent, registry.root, dry_run=dry_run)]


def _left_over(folder: Path, root: Path, *, dry_run: bool) -> Iterator[Freed]:
    """What killed processes left in a folder, which is told by its place below ``root``."""
    sizes = {path: files.tree_bytes(path) for path in files.children(folder, atomic.STAGING_PREFIX)}
    for path in atomic.sweep_staging(folder, dry_run=dry_run):
        yield Freed(str(path.relative_to(root)), "left by a killed process", str(path), sizes.get(path, 0))


def _free(what: str, why: str, path: Path, remove: Callable[[Path], None], *, dry_run: bool) -> Freed:
    """Measure one thing, and remove it."""
    freed = Freed(what, why, str(path), files.tree_bytes(path))
    if not dry_run:
        remove(path)
    return freed


def drop_runs(registry: Registry, *, dry_run: bool) -> list[Freed]:
    """Remove unfinished runs with their saves, but for those that go on now."""
    freed = []
    for run in unfinished_runs(registry):
        folder, why = Path(run["path"]), f"unfinished at step {run['step']}"
        with contextlib.suppress(Failed), RunFolder(folder).held():
            freed.append(_free(run["name"], why, folder, files.remove_tree, dry_run=dry_run))
    return freed


def free_logs(registry: Registry, gone: Collection[str] = (), *, every: bool, dry_run: bool) -> list[Freed]:
    """Remove what trackers wrote about versions that are no more, or with ``every`` about all finished runs.

    Args:
        gone: labels of versions and names of runs that are removed now, or would be.
    """
    freed = []
    for folder in files.children(registry.root / "logs"):
        with contextlib.suppress(Usage, Failed):  # no name, an entry that cannot be read, or training that goes on
            if not list(_finished_logs(registry, folder, gone, every)) and files.children(folder):  # a kill leaves none
                continue
            with contextlib.nullcontext() if dry_run else run_folder(registry, folder.name).held():
                for log in list(_finished_logs(registry, folder, gone, every)):
                    what = f"logs/{folder.name}/{log.name}"
                    freed.append(_free(what, "written by --report-to", log, files.remove_tree, dry_run=dry_run))
                if not dry_run and folder.is_dir() and not files.children(folder):
                    folder.rmdir()
    return freed


def _finished_logs(registry: Registry, folder: Path, gone: Collection[str], every: bool) -> Iterator[Path]:
    name = folder.name
    if run_folder(registry, name).path.is_dir() and name not in gone:
        return
    adapter = registry.find_adapter(name)
    versions = [*(adapter.versions if adapter else ()), *registry.find_removed(name).versions]
    kept = {str(v.version) for v in versions if f"{name}@{v.version}" not in gone}
    for log in files.children(folder):
        if log.name.isdigit() and (every or log.name not in kept):
            yield log


def tokens_folder() -> Path:
    """Where tokenised data is cached."""
    return cache_root() / "tokens"


def free_tokens(*, every: bool, dry_run: bool) -> list[Freed]:
    """Remove tokenised data that was not used for long, or with ``every`` all of it, and what killed runs left."""
    return [
        *_left_over(tokens_folder(), tokens_folder(), dry_run=dry_run),
        *_unused(tokens_folder().glob("[0-9a-f]*"), "cached tokens", every=every, dry_run=dry_run),
    ]


def _unused(folders: Iterable[Path], what: str, *, every: bool, dry_run: bool) -> Iterator[Freed]:
    """Remove what was not used for long, or with ``every`` all of it."""
    for folder in sorted(folders):
        with contextlib.suppress(OSError):  # somebody else cleans up, too, or it is somebody else's
            used = folder.stat().st_mtime
            if every or time.time() - used > _UNUSED_SECONDS:
                why = f"{what}, last used {datetime.fromtimestamp(used, UTC).date()}"
                kind, dash, digest = folder.name.rpartition("-")
                name = f"{folder.parent.name}/{kind}{dash}{digest[:8]}"
                yield _free(name, why, folder, atomic.discard_folder, dry_run=dry_run)


def free_caches(*, every: bool, dry_run: bool) -> list[Freed]:
    """Free what is only a cache: what was not used for long, or with ``every`` all of it, converted models as well."""
    return [
        *free_tokens(every=every, dry_run=dry_run),
        *free_exports(every=every, dry_run=dry_run),
        *(free_conversions(dry_run=dry_run) if every else ()),
    ]


def free_conversions(*, dry_run: bool) -> list[Freed]:
    """Remove models that were converted from GGUF."""
    with contextlib.nullcontext(cache_root() / "bases") if dry_run else converted_models() as folder:
        freed = list(_left_over(folder, folder, dry_run=dry_run))
        for model in sorted(folder.glob("gguf-*")):
            freed.append(_free(model.name, "converted from GGUF", model, atomic.discard_folder, dry_run=dry_run))
    return freed


def free_exports(*, every: bool, dry_run: bool) -> list[Freed]:
    """Remove adapters that were exported for an engine and not used for long, or with ``every`` all of them."""
    place = cache_root() / "adapters"
    lock = contextlib.nullcontext(place) if dry_run or not place.is_dir() else exported_adapters()
    with lock as folder:
        freed = list(_left_over(folder, folder, dry_run=dry_run))
        freed += _unused(folder.glob("[a-z]*-*"), "exported for an engine", every=every, dry_run=dry_run)
    return freed
