"""Repos on the Hub: as people type them, and their files at a commit, held against files here."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from stackctl.core.errors import Usage
from stackctl.core.hub_ids import is_hub_id
from stackctl.storage.hashes import sha256_bytes, sha256_file

_ADDRESSES = ("https://huggingface.co/", "https://hf.co/", "hf://")


def parse_repo(text: str) -> str:
    """``owner/name``, also when it is given as the repo's address.

    Raises:
        Usage: it is neither.
    """
    for prefix in _ADDRESSES:
        text = text.removeprefix(prefix)
    repo = text.strip("/")
    if not is_hub_id(repo):
        raise Usage(f"'{text}' is not the id of a repo", hint="write owner/name, for example me/storyteller")
    return repo


@dataclass(frozen=True)
class RepoPlace:
    """Where on the Hub something lies, as it was ``typed``: a folder of a repo, "" its root, at a revision."""

    typed: str
    repo: str
    folder: str = ""
    revision: str | None = None

    def at(self, folder: str) -> str:
        """Another folder of the repo at the same revision, as it is typed."""
        return "/".join(filter(None, (self.repo, folder))) + (f"@{self.revision}" if self.revision else "")


def parse_place(text: str) -> RepoPlace:
    """``owner/name``, ``owner/name/folder`` or the address of one, with or without ``@revision``.

    Raises:
        Usage: it is none of these.
    """
    place, at, revision = text.partition("@")
    if at and not revision:
        raise Usage(f"'{text}' has no revision after @", hint="write REPO@REVISION, for example me/storyteller@v1")
    path = place
    for prefix in _ADDRESSES:
        path = path.removeprefix(prefix)
    owner, _, rest = path.strip("/").partition("/")
    name, _, below = rest.partition("/")
    repo = parse_repo(f"{owner}/{name}" if name else path)
    folders = below.split("/") if below else []
    if path != place and folders[:1] == ["tree"]:  # the address of a folder's page
        revision, folders = revision or "".join(folders[1:2]), folders[2:]
    if any(part in ("", ".", "..") for part in folders):
        raise Usage(f"'{text}' names no folder of a repo", hint=f"write OWNER/NAME/FOLDER, for example {repo}/style")
    return RepoPlace(text, repo, "/".join(folders), revision or None)


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
