"""Hashes of files and of folders of texts, and a memory of them, so that checking large ones again is cheap.

A file is taken for unchanged while its :func:`file_state` is what it was; ``verify`` hashes regardless.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from stackctl.storage.atomic import write_atomic
from stackctl.storage.files import read_json_if_any

DIGESTS_FILE = ".digests.json"
_CHUNK = 1 << 20
_SETTLED_SECONDS = 2.0
"""A file system's clock may give two changes one time, when one follows the other at once."""


def sha256_bytes(data: bytes) -> str:
    """``sha256:<hex>`` of some bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, read: Callable[[int], None] = lambda _: None) -> str:
    """``sha256:<hex>`` of a file, read in pieces; ``read`` is called with the bytes of each."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_CHUNK):
            digest.update(piece)
            read(len(piece))
    return "sha256:" + digest.hexdigest()


def file_state(info: os.stat_result) -> tuple[int, int, int, int]:
    """What a file's content cannot change without: its size, its inode, its time and that of its inode's change.

    The last of them cannot be set back, short of setting the machine's clock.
    """
    return info.st_size, info.st_ino, info.st_mtime_ns, info.st_ctime_ns


def is_settled(info: os.stat_result, now: float) -> bool:
    """Whether a file's next change is sure to show in its :func:`file_state`, as it was at the time ``now``."""
    return now - max(info.st_mtime, info.st_ctime) > _SETTLED_SECONDS


class DigestCache:
    """``sha256:<hex>`` of files, kept in one JSON file; what cannot be read or written is only hashed again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / DIGESTS_FILE
        self._changed = False

    @functools.cached_property
    def _known(self) -> dict[str, list[object]]:
        """Read when it is first asked, for ``verify`` asks for none of it, a hundred thousand times."""
        return read_json_if_any(self._path)

    def sha256(self, path: Path) -> str:
        """The hash of a file, from memory if the file is as it was."""
        info, now = path.stat(), time.time()
        key = list(file_state(info))
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == key and isinstance(known[-1], str):
            return known[-1]
        digest = sha256_file(path)
        if is_settled(info, now):
            self._known[str(path)] = [*key, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learned; the last of several processes wins, which costs a hash at most."""
        if self._changed:
            with contextlib.suppress(OSError):
                kept = {path: value for path, value in self._known.items() if Path(path).exists()}
                write_atomic(self._path, json.dumps(kept))


TEXTS = (".txt", ".md", ".markdown", ".rst", ".text")
"""How the names of texts end that are read from a folder."""


def texts_in(folder: Path) -> list[Path]:
    """The texts in a folder and below it, by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in TEXTS and p.is_file())


def data_digest(path: Path) -> str:
    """``sha256:<hex>`` of a file's bytes, or of the names and bytes of a folder's texts."""
    if not path.is_dir():
        return sha256_file(path)
    parts = [f"{text.relative_to(path).as_posix()} {sha256_file(text)}" for text in texts_in(path)]
    return sha256_bytes("\n".join(parts).encode())
