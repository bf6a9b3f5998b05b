"""Files of a repo on the Hub, and whether they hold the same bytes as files here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from stackctl.storage.hashes import sha256_bytes, sha256_file

Content = Path | bytes
"""A file to upload: where it lies, or what is in it."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repo. Git's own SHA-1 says what is in it, of a large file the SHA-256 of its bytes."""

    path: str
    size: int
    git_oid: str
    sha256: str | None = None

    def holds(self, content: Content) -> bool:
        """Whether the remote file has exactly these bytes."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if size != self.size:
            return False
        if self.sha256 is not None:
            return sha256(content) == self.sha256
        return _git_oid(content, size) == self.git_oid


@dataclass(frozen=True)
class Snapshot:
    """A repo at one commit; ``commit`` is None when the repo or its first commit does not exist."""

    commit: str | None = None
    private: bool | None = None
    files: dict[str, RemoteFile] = field(default_factory=dict)


def sha256(content: Content) -> str:
    """The SHA-256 of a content as hexadecimal text."""
    prefixed = sha256_file(content) if isinstance(content, Path) else sha256_bytes(content)
    return prefixed.removeprefix("sha256:")


def _git_oid(content: Content, size: int) -> str:
    digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
