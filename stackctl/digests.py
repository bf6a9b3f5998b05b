"""Hashes of large files, remembered by what the file system says of them, so that checking them again is cheap.

A file is taken for unchanged while its size, its inode and both its times are what they were. A change of content
cannot keep the time of the inode's change, short of setting the machine's clock; ``verify`` hashes regardless.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from stackctl.files import read_own_json, sha256_file, write_atomic

FILE = ".digests.json"
_SETTLED_SECONDS = 2.0
"""Younger changes are not remembered: a file system's clock may give two writes one time."""


class DigestCache:
    """``sha256:<hex>`` of files, kept in one JSON file; what cannot be read or written is only hashed again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        known = read_own_json(self._path)
        self._known: dict[str, list[object]] = known if isinstance(known, dict) else {}
        self._changed = False

    def sha256(self, path: Path) -> str:
        """The hash of a file, from memory if the file is as it was."""
        stat = path.stat()
        key = [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
        known = self._known.get(str(path))
        if isinstance(known, list) and known[:-1] == key and isinstance(known[-1], str):
            return known[-1]
        digest = sha256_file(path)
        if time.time() - max(stat.st_mtime, stat.st_ctime) > _SETTLED_SECONDS:
            self._known[str(path)] = [*key, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write what was learned; the last of several processes wins, which costs a hash at most."""
        if self._changed:
            with contextlib.suppress(OSError):
                kept = {path: value for path, value in self._known.items() if Path(path).exists()}
                write_atomic(self._path, json.dumps(kept))
