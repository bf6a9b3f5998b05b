"""A repository on the Hub, through huggingface_hub: what is in it, one commit to it, files from it.

Authentication, endpoint, proxies and cache are huggingface_hub's own. What it leaves open is closed here and in
:mod:`stackctl.hub.http_client`: it prints progress bars into pipes, and keeps whatever bytes arrive.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stackctl import __version__
from stackctl.core import Say
from stackctl.core.command_line import CommandLine, typed
from stackctl.core.errors import HubFailure, NotFound, StackctlError, VerificationFailed, raise_all
from stackctl.hub import http_client
from stackctl.hub.http_client import impatient_client, plain_client
from stackctl.hub.hub_errors import Attempt, explained, may_be_done, offline, scrub
from stackctl.hub.repos import Content, RemoteFile, Snapshot, parse_repo
from stackctl.storage.files import human_bytes

_BASE_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Commit:
    oid: str
    url: str
    pull_request: str | None = None


class Hub:
    """One repo on the Hub, open for one command."""

    def __init__(self, api: Any, attempt: Attempt, say: Say) -> None:
        self._api = api
        self._attempt = attempt
        self._say = say
        self.repo = attempt.repo
        self.url = f"{attempt.host}/{attempt.repo}"

    def require_login(self) -> None:
        """Make sure that there is a token to write with, and that huggingface_hub may go out.

        Raises:
            HubFailure: one or both are missing.
        """
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

        with explained(self._attempt):
            known = "authorization" in build_hf_headers()
        problems: list[StackctlError] = []
        if constants.HF_HUB_OFFLINE:
            problems.append(offline(self._attempt))
        if not known:
            hint = f"hf auth login (or set HF_TOKEN), then: {self._attempt.again}"
            problems.append(HubFailure(f"no token to write to {self.repo} with", hint=hint))
        raise_all(problems)

    def find(self, revision: str | None = None) -> Snapshot | None:
        """The repo at a revision (default: its main branch), or None when the repo does not exist."""
        from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

        attempt = replace(self._attempt, revision=revision)
        with explained(attempt):
            try:
                info = self._api.model_info(self.repo, revision=revision)
            except HfHubHTTPError as error:
                if isinstance(error, RevisionNotFoundError) or error.response.status_code != 404:
                    raise
                return None
        return self.at(info.sha, info.private) if info.sha else Snapshot(None, info.private)

    def revisions(self) -> list[str]:
        """The names of the repo's branches and tags; none where the Hub does not say."""
        with contextlib.suppress(Exception):
            refs = self._api.list_repo_refs(self.repo)
            return [ref.name for ref in (*refs.branches, *refs.tags)]
        return []

    def at(self, commit: str, private: bool | None = None) -> Snapshot:
        """The repo at a commit."""
        from huggingface_hub.hf_api import RepoFile

        with explained(replace(self._attempt, revision=commit)):
            tree = list(self._api.list_repo_tree(self.repo, revision=commit, recursive=True))
            found = [
                RemoteFile(f.path, f.lfs.size if f.lfs else f.size, f.blob_id, f.lfs.sha256 if f.lfs else None)
                for f in tree
                if isinstance(f, RepoFile)
            ]
            if not all(isinstance(file.path, str) and isinstance(file.size, int) for file in found):
                raise ValueError("files without a name or a size")
        return Snapshot(commit, private, {file.path: file for file in found})

    def create(self, *, private: bool) -> None:
        """Make the repo."""
        with explained(self._attempt):
            self._api.create_repo(self.repo, private=private or None)

    def commit(
        self,
        add: dict[str, Content],
        delete: list[str],
        *,
        message: str,
        parent: str | None,
        revision: str | None,
        create_pr: bool,
    ) -> Commit:
        """Everything in one commit on top of ``parent``, or nothing."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationAdd(path, content) for path, content in sorted(add.items())]
        operations += [CommitOperationDelete(path) for path in delete]
        attempt = replace(self._attempt, revision=revision)
        try:
            with explained(attempt), warnings.catch_warnings(record=True) as caught:
                done = self._api.create_commit(
                    self.repo, operations, commit_message=message, parent_commit=parent, revision=revision,
                    create_pr=create_pr,
                )  # fmt: skip
        except HubFailure as error:
            if create_pr and may_be_done(error):  # nothing would stop a second one
                where = f"{self.url}/discussions"
                raise HubFailure(
                    error.message, hint=f"look at {where}: it may be there all the same; if not: {attempt.again}"
                ) from error
            raise
        for warning in caught:  # what the Hub thinks of the card
            if issubclass(warning.category, UserWarning):
                self._say(scrub(str(warning.message)))
        return Commit(done.oid, scrub(done.commit_url), done.pr_url)

    def tag(self, name: str, commit: str) -> None:
        """Give a commit that is there a tag; nothing happens when it has that one already.

        Raises:
            HubFailure: the tag is on another commit, or cannot be made.
        """
        try:
            elsewhere = self._tagged(name, commit)
        except (HubFailure, NotFound) as error:
            raise HubFailure(
                f"the files are pushed, but without the tag '{name}': {error.message}", hint=error.hint
            ) from error
        if elsewhere != commit:
            raise HubFailure(
                f"{self.repo} has the tag '{name}' already, on commit {str(elsewhere)[:12]}; the files are pushed",
                hint=f"choose another tag, or remove it: hf repo tag delete {self.repo} {name}",
            )

    def _tagged(self, name: str, commit: str) -> str | None:
        """Make a tag unless there is one of that name; returns the commit that it is on."""
        from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError

        with explained(self._attempt):
            try:
                self._api.create_tag(self.repo, tag=name, revision=commit)
            except HfHubHTTPError as error:
                if error.response.status_code != 409:
                    raise
                try:
                    return str(self._api.model_info(self.repo, revision=name).sha)
                except RevisionNotFoundError:  # the conflict was another one
                    raise error from None
            return commit

    def download(self, file: RemoteFile, commit: str) -> Path:
        """A file at a commit, in huggingface_hub's cache, with the bytes that the repo says it has.

        Raises:
            VerificationFailed: other bytes arrived, twice (once they may come from a damaged cache).
        """
        from huggingface_hub import hf_hub_download

        for _ in range(2):
            with explained(replace(self._attempt, revision=commit)):
                found = hf_hub_download(self.repo, file.path, revision=commit, etag_timeout=http_client.TIMEOUT_SECONDS)
            path = Path(found)
            if file.holds(path):
                return path
            _throw_away(path)
        raise self._other_bytes(file)

    def download_base_folder(self, seen: Snapshot) -> Path:
        """The files of a base model in a repo, as one folder of huggingface_hub's cache, with the right bytes.

        Raises:
            VerificationFailed: other bytes arrived.
        """
        from huggingface_hub import snapshot_download

        with explained(replace(self._attempt, revision=seen.commit)):
            folder = Path(snapshot_download(self.repo, revision=seen.commit, allow_patterns=_BASE_FILES))
        for path, file in seen.files.items():
            if (folder / path).is_file() and not file.holds(folder / path):
                _throw_away(folder / path)
                raise self._other_bytes(file)
        return folder

    def cached_base_folder(self, commit: str) -> Path | None:
        """What :meth:`download_base_folder` fetched before; None when some of it is missing. Asks nobody."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        with contextlib.suppress(LocalEntryNotFoundError):
            return Path(
                snapshot_download(self.repo, revision=commit, allow_patterns=_BASE_FILES, local_files_only=True)
            )
        return None

    def _other_bytes(self, file: RemoteFile) -> VerificationFailed:
        return VerificationFailed(
            f"{file.path} of {self.repo} arrived with other bytes than its digest says; it was thrown away",
            hint=f"try again: {self._attempt.again}",
        )


def _throw_away(path: Path) -> None:
    """Remove a file from huggingface_hub's cache, which would else give the same bytes for ever."""
    for damaged in {path.resolve(), path}:
        damaged.unlink(missing_ok=True)


def download_base(repo: str, revision: str | None, say: Say) -> tuple[Path, str]:
    """A base model's files in huggingface_hub's cache, and their commit; a commit that is there asks nobody.

    Raises:
        NotFound, HubFailure, VerificationFailed: it is not there; it cannot be fetched; other bytes arrived.
    """
    with open_hub(parse_repo(repo), again=typed(), writes=False, say=say, progress=sys.stderr.isatty()) as hub:
        if revision and re.fullmatch(r"[0-9a-f]{40}", revision) and (kept := hub.cached_base_folder(revision)):
            return kept, revision
        seen = hub.find(revision)
        if seen is None or seen.commit is None:
            raise NotFound(f"there is no model '{repo}' at {hub.url}", hint="check the name; if private: hf auth login")
        size = sum(f.size for f in seen.files.values() if any(fnmatch.fnmatch(f.path, p) for p in _BASE_FILES))
        say(f"fetching {repo} at {seen.commit[:12]} ({human_bytes(size)})")
        return hub.download_base_folder(seen), seen.commit


@contextlib.contextmanager
def open_hub(repo: str, *, again: CommandLine, writes: bool, say: Say, progress: bool = False) -> Iterator[Hub]:
    """Work with a repo; huggingface_hub is made quiet, and impatient, for as long as that lasts."""
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    attempt = Attempt(repo, scrub(constants.ENDPOINT) or "HF_ENDPOINT, which is empty,", again, writes=writes)
    level = logging.get_verbosity()
    with contextlib.ExitStack() as stack:
        if "HF_HUB_VERBOSITY" not in os.environ and not constants.HF_DEBUG:
            logging.set_verbosity_error()
            stack.callback(logging.set_verbosity, level)
        if not progress and constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            stack.enter_context(disable_progress_bars())
        hooks = huggingface_hub.get_session().event_hooks  # huggingface_hub's own: offline mode is one of them
        huggingface_hub.set_client_factory(lambda: impatient_client(attempt, say, hooks))
        stack.callback(huggingface_hub.set_client_factory, lambda: plain_client(hooks))
        yield Hub(huggingface_hub.HfApi(library_name="stackctl", library_version=__version__), attempt, say)
