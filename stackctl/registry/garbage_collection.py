"""What ``gc`` can free beside the registry's weights: unfinished runs, trackers' logs, and what is only a cache.

What is in a cache can be made again, so that it may go at any time: a run that reads it has its files open.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path

from stackctl.core.errors import Failed, Usage
from stackctl.registry import Freed, Registry
from stackctl.registry.base_models import converted_models
from stackctl.registry.index import indices_folder
from stackctl.registry.run_folders import RunFolder, run_folder, unfinished_runs
from stackctl.storage import files
from stackctl.storage.cache_folder import cache_root

_UNUSED_SECONDS = 30 * 24 * 3600
"""Tokenised data that no run asked for in so long is removed."""


def drop_runs(registry: Registry, *, dry_run: bool) -> list[Freed]:
    """Remove unfinished runs with their saves, but for those that go on now."""
    freed = []
    for run in unfinished_runs(registry):
        folder = Path(run["path"])
        with contextlib.suppress(Failed), RunFolder(folder).held():
            freed.append(Freed(run["name"], f"unfinished at step {run['step']}", str(folder), files.tree_bytes(folder)))
            if not dry_run:
                files.remove_tree(folder)
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
                    freed.append(Freed(what, "written by --report-to", str(log), files.tree_bytes(log)))
                    if not dry_run:
                        files.remove_tree(log)
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
    freed = list(_left_over(tokens_folder(), dry_run))
    for folder in sorted(tokens_folder().glob("[0-9a-f]*")):
        with contextlib.suppress(OSError):  # somebody else cleans up, too, or it is somebody else's
            used = folder.stat().st_mtime
            if every or time.time() - used > _UNUSED_SECONDS:
                size, when = files.tree_bytes(folder), datetime.fromtimestamp(used, UTC).date()
                if not dry_run:
                    files.discard(folder)
                freed.append(Freed(f"tokens/{folder.name[:8]}", f"cached tokens, last used {when}", str(folder), size))
    return freed


def free_conversions(*, dry_run: bool) -> list[Freed]:
    """Remove models that were converted from GGUF."""
    with contextlib.nullcontext(cache_root() / "bases") if dry_run else converted_models() as folder:
        freed = list(_left_over(folder, dry_run))
        for model in sorted(folder.glob("gguf-*")):
            freed.append(Freed(model.name, "converted from GGUF", str(model), files.tree_bytes(model)))
            if not dry_run:
                files.discard(model)
    return freed


def free_indices(*, dry_run: bool) -> list[Freed]:
    """Remove what is remembered of the entries of every registry."""
    freed = list(_left_over(indices_folder(), dry_run))
    for index in files.children(indices_folder()):
        if index.suffix != ".msgpack":
            continue
        with contextlib.suppress(OSError):  # somebody else cleans up, too, or it is somebody else's
            size = index.stat().st_size
            if not dry_run:
                index.unlink()
            freed.append(Freed(f"index/{index.stem[:8]}", "an index of entries", str(index), size))
    return freed


def _left_over(folder: Path, dry_run: bool) -> Iterator[Freed]:
    sizes = {path: files.tree_bytes(path) for path in folder.glob(f"{files.STAGING_PREFIX}*")}
    for path in files.sweep_staging(folder, dry_run=dry_run):
        yield Freed(path.name, "left by a killed process", str(path), sizes.get(path, 0))
