"""Repos on the Hub, their folders and revisions, as people type them."""

from __future__ import annotations

from dataclasses import dataclass

from stackctl.core.errors import Usage
from stackctl.core.hub_ids import is_hub_id

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
