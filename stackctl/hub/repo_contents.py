"""A repo on the Hub as adapters that could be registered: read from its small files, before any weights are fetched."""

from __future__ import annotations

import contextlib
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.command_line import CommandLine
from stackctl.core.errors import Incompatible, NotFound, Usage, VerificationFailed, closest, listed
from stackctl.core.fields import SCHEMA
from stackctl.core.schema import Adapter, AdapterInfo, AdapterVersion
from stackctl.hub.client import Hub
from stackctl.hub.published import ADAPTER_FILE, CHECKPOINT, MEMBERS
from stackctl.hub.repos import RemoteFile, RepoPlace, Snapshot
from stackctl.lora.checkpoint import CONFIG, INFO, WEIGHTS, adapter_digest, read_config, read_info
from stackctl.storage.files import MAX_TEXT_BYTES, human_bytes
from stackctl.storage.yaml_files import read_yaml

_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


@dataclass(frozen=True)
class RepoAdapter:
    """One adapter of a repo, as far as its small files tell.

    ``entry`` and ``info`` are None where stackctl did not write it; ``digest`` where only the weights will tell.
    """

    folder: str
    name: str
    number: int
    config: dict[str, Any]
    entry: AdapterVersion | None
    info: AdapterInfo | None
    description: str
    digest: str | None
    files: dict[str, RemoteFile]

    @property
    def label(self) -> str:
        return f"{self.name}@{self.number}"


def _some(folders: list[str]) -> str:
    """Folders by name, the first of many."""
    return listed([folder or "its root" for folder in folders], most=20)


class RepoReader:
    """Reads a repo at one commit."""

    def __init__(self, hub: Hub, seen: Snapshot) -> None:
        if seen.commit is None:
            raise Incompatible(f"{hub.repo} is empty", hint="nothing was pushed to it yet")
        self.hub, self.seen, self.commit = hub, seen, seen.commit

    def _fetch(self, path: str) -> Path:
        """A small file of the repo.

        Raises:
            Incompatible: it is not small.
        """
        file = self.seen.files[path]
        if file.size > MAX_TEXT_BYTES:
            raise Incompatible(
                f"{path} of {self.hub.repo} has {human_bytes(file.size)}; nothing was downloaded",
                hint="ask its author what it is",
            )
        return self.hub.download(file, self.commit)

    def read(self, path: str, type_: type[Any]) -> Any:
        """A YAML entry of the repo; None when it is not there.

        Raises:
            Incompatible: it is none that this stackctl can read.
        """
        if path not in self.seen.files:
            return None
        try:
            return read_yaml(self._fetch(path), type_, schema=SCHEMA)
        except Usage as error:  # not written by the one who is typing
            said = error.message.rpartition(f"/{path.rpartition('/')[2]}")[2].lstrip(":, ")
            raise Incompatible(f"{path} of {self.hub.repo} cannot be read: {said}", hint=error.hint) from None

    def part(self, folder: str, name: str | None = None, called: str = "") -> RepoAdapter:
        """An adapter of the repo, by its configuration and its entry; ``name`` is what it shall be called here.

        Without one, and where the repo has no entry, it is called as the folder that was asked for, else as the repo.

        Raises:
            Incompatible: it has no safetensors, or its files are none that can be read.
            VerificationFailed: its files are not the ones that its entry records.
        """
        prefix = f"{folder}/" if folder else ""
        if f"{prefix}{WEIGHTS}" not in self.seen.files:
            raise self._no_weights(prefix)
        config = self._config(f"{prefix}{CONFIG}")
        adapter = self.read(f"{prefix}{ADAPTER_FILE}", Adapter)
        entry = adapter.versions[-1] if adapter and adapter.versions else None
        if entry and not 1 <= entry.version < 10**9:
            raise Incompatible(f"{prefix}{ADAPTER_FILE} of {self.hub.repo} has no valid version")
        weights = self.seen.files[f"{prefix}{WEIGHTS}"].sha256
        digest = adapter_digest(config, f"sha256:{weights}") if weights else None
        if entry and digest and entry.digest != digest:
            raise self.other_digest(folder)
        last = re.sub(r"[^a-z0-9._-]", "-", (called or self.hub.repo).rpartition("/")[2].lower())[:64]
        return RepoAdapter(
            folder=folder, name=name or (adapter.name if adapter else last),
            number=entry.version if entry else 1, config=config, entry=entry,
            info=read_info(self._fetch(f"{prefix}{INFO}").parent) if f"{prefix}{INFO}" in self.seen.files else None,
            description=adapter.description if adapter else "", digest=digest or (entry.digest if entry else None),
            files={n: self.seen.files[f"{prefix}{n}"] for n in CHECKPOINT if f"{prefix}{n}" in self.seen.files},
        )  # fmt: skip

    def _config(self, path: str) -> dict[str, Any]:
        """The configuration of an adapter of the repo.

        Raises:
            Incompatible: it is none that can be used.
        """
        fetched = self._fetch(path)
        try:
            return read_config(fetched.parent)
        except Incompatible as error:
            said = error.message.replace(str(fetched), path).replace(str(fetched.parent), path)
            hint = error.hint if path not in said else "ask its author to push it again"
            raise Incompatible(f"{self.hub.repo}: {said}", hint=hint) from None

    def find(self, digest: str, name: str) -> RepoAdapter | None:
        """The adapter of the repo with a digest, looked for under its own name first; None when it holds none.

        Where only the weights will tell, the first one that may be it.
        """
        holding = self._folders(WEIGHTS) & self._folders(CONFIG)
        for folder in sorted(holding, key=lambda found: (found.rpartition("/")[2] != name, found)):
            with contextlib.suppress(Incompatible):  # another one that is there as well
                part = self.part(folder, name)
                if part.digest in (None, digest):
                    return part
        return None

    def fetch(self, part: RepoAdapter, folder: Path, there: Path | None = None) -> None:
        """Bring an adapter's files into ``folder``, but for those that ``there`` has already; its config always."""
        for name, file in part.files.items():
            have = there / name if there and name != CONFIG else None
            if have is None or not have.is_file() or (name == WEIGHTS and not file.holds(have)):
                shutil.copyfile(self.hub.download(file, self.commit), folder / name)

    def _no_weights(self, prefix: str) -> Incompatible:
        pickles = sorted(p for p in self.seen.files if p.startswith(prefix) and p.endswith(_PICKLES))
        if pickles:
            return Incompatible(
                f"{self.hub.repo} has only {pickles[0]}, a pickle, which can execute code; nothing was downloaded",
                hint="ask its author to save it again with safe_serialization=True",
            )
        return Incompatible(f"{self.hub.repo} has no {prefix}{WEIGHTS}", hint="ask its author to push it again")

    def other_digest(self, folder: str) -> VerificationFailed:
        """The error that an adapter of the repo is not the one that the repo records."""
        where = f" in {folder}/" if folder else ""
        return VerificationFailed(
            f"the adapter{where} of {self.hub.repo} is not the one that is recorded there (digests differ)",
            hint="somebody changed it: pull an older commit (REPO@COMMIT), or ask for a new push",
        )

    def _folders(self, name: str) -> set[str]:
        """The folders of the repo that hold a file of that name; what begins at a root of its own is in none."""
        paths = (path for path in self.seen.files if not path.startswith("/"))
        return {path.rpartition("/")[0] for path in paths if path.rpartition("/")[2] == name}

    def adapter_folder(self, place: RepoPlace, again: CommandLine) -> str:
        """The folder of the repo that holds the adapter that was asked for: that very one, or the only one below it.

        Raises:
            Incompatible: none does, or several do.
            NotFound: a folder was asked for that holds none.
        """
        holding = sorted(self._folders(CONFIG))
        under = f"{place.folder}/" if place.folder else ""
        found = [folder for folder in holding if folder == place.folder or folder.startswith(under)]
        if not place.folder:
            found = [folder for folder in found if not folder.startswith(f"{MEMBERS}/")] or found
        if place.folder in found or len(found) == 1:
            return place.folder if place.folder in found else found[0]
        if found:
            raise Incompatible(
                f"{place.at(place.folder)} holds several adapters: {_some(found)}",
                hint=f"choose one of them: {again.naming(place.typed, place.at(found[0]))}",
            )
        if place.folder:
            there = (
                f"it has {_some(holding)}" if holding else f"it has none at all: https://huggingface.co/{place.repo}"
            )
            near = closest(place.folder, holding)
            if near:
                there += f"; did you mean: {again.naming(place.typed, place.at(near))}"
            raise NotFound(f"{place.repo} has no adapter in '{place.folder[:200]}'", hint=there)
        if "config.json" in self.seen.files:
            hint = f"is it a base? stackctl base add NAME {self.hub.repo}"
            raise Incompatible(f"{self.hub.repo} is a model, not an adapter", hint=hint)
        raise Incompatible(
            f"{self.hub.repo} holds no PEFT adapter", hint=f"an adapter is a repo with {CONFIG} and {WEIGHTS}"
        )
