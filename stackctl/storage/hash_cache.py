"""Hashes of large files, remembered by what the file system says of them, so that checking them again is cheap.

A file is taken for unchanged while its :func:`stackctl.storage.files.state` is what it was; ``verify`` hashes
regardless.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from pathlib import Path

from stackctl.storage.files import is_settled, read_own_json, sha256_file, state, write_atomic

FILE = ".digests.json"


class DigestCache:
    """``sha256:<hex>`` of files, kept in one JSON file; what cannot be read or written is only hashed again."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._changed = False

    @functools.cached_property
    def _known(self) -> dict[str, list[object]]:
        """Read when it is first asked, for ``verify`` asks for none of it, a hundred thousand times."""
        known = read_own_json(self._path)
        return known if isinstance(known, dict) else {}

    def sha256(self, path: Path) -> str:
        """The hash of a file, from memory if the file is as it was."""
        info, now = path.stat(), time.time()
        key = list(state(info))
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
