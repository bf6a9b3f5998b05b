"""Where the files of damaged versions can be had from, and bringing them back from there.

The nearest source comes first: a folder that was named, a copy in this registry, then the Hub, by the repository and
commit that the entry records.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from stackctl.core import Say
from stackctl.core.command_line import typed
from stackctl.core.errors import NotFound, StackctlError, VerificationFailed
from stackctl.lora.checkpoint import INFO, WEIGHTS
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.checkpoint_files import checkpoint_folders, copy_checkpoint, folder_digest
from stackctl.registry.restore import find_copies, own_folder, restore_files
from stackctl.registry.store import Registry
from stackctl.storage import atomic


@dataclass(frozen=True)
class RepairSource:
    """Where a version's files are; ``place`` is a folder, or REPO@COMMIT on the Hub."""

    kind: Literal["folder", "registry", "hub"]
    place: str

    def __str__(self) -> str:
        repo, _, commit = self.place.partition("@")
        return f"{repo} on the Hub (commit {commit[:12]})" if self.kind == "hub" else self.place

    def json(self) -> dict[str, Any]:
        return {"from": self.kind, "place": self.place}


def find_sources(
    registry: Registry, members: Collection[ResolvedMember], folder: Path | None = None
) -> dict[str, list[RepairSource]]:
    """The sources of each version, by its label, the nearest first; those on the Hub as recorded, asking nobody.

    Args:
        folder: to look in besides: a checkpoint, a copy of ``weights/``, a whole registry.
    """
    wanted = {member.version.digest for member in members}
    named = _copies_in(folder, members) if folder and members else {}
    here = find_copies(registry, wanted) if members else {}
    found = {}
    for member in members:
        version = member.version
        places = dict.fromkeys(f"{place.repo}@{place.commit}" for place in (version.hub, version.pushed) if place)
        found[member.label] = [
            *(RepairSource("folder", str(path)) for path in named.get(version.digest, ())),
            *(RepairSource("registry", str(path)) for path in here.get(version.digest, ())),
            *(RepairSource("hub", place) for place in places),
        ]
    return found


def _copies_in(folder: Path, members: Collection[ResolvedMember]) -> dict[str, list[Path]]:
    """Whole checkpoints below a folder; what is too small to be one of them is not hashed."""
    wanted, least = {m.version.digest for m in members}, min(m.version.bytes for m in members)
    found: dict[str, list[Path]] = {}
    for place in checkpoint_folders(folder.resolve()):
        if (place / WEIGHTS).stat().st_size >= least and (digest := folder_digest(place)) in wanted:
            found.setdefault(str(digest), []).append(place)
    return found


def repair(
    registry: Registry, member: ResolvedMember, sources: list[RepairSource], say: Say, *, progress: bool
) -> RepairSource:
    """Bring a version's files back from the first of its sources that has them, and return that.

    Args:
        progress: whether downloads show how far they are.

    Raises:
        NotFound, VerificationFailed: there is no source, or none that has them; the message says why of each.
    """
    if not sources:
        raise NotFound("there is no copy of it here, and its entry records no place on the Hub")
    why = []
    for source in sources:
        say(f"restoring {member.label} from {source}")
        try:
            with atomic.staging_directory(registry.root / "weights") as staged:
                if source.kind == "hub":
                    _fetch(registry, member, source.place, staged, say, progress)
                else:
                    _copy(Path(source.place), staged, is_its_own=source.kind == "folder")
                restore_files(registry, member, staged)
            return source
        except StackctlError as error:
            why.append(error.message)
    raise VerificationFailed(f"it could not be restored: {'; '.join(why)}")


def _copy(folder: Path, staged: Path, *, is_its_own: bool) -> None:
    try:
        copy_checkpoint(folder, staged)
    except FileNotFoundError:
        raise NotFound(f"{folder} is gone") from None
    if not is_its_own:  # the same weights under another name, which that file tells
        (staged / INFO).unlink(missing_ok=True)


def _fetch(registry: Registry, member: ResolvedMember, place: str, staged: Path, say: Say, progress: bool) -> None:
    from stackctl.hub.client import open_hub
    from stackctl.hub.repo_contents import RepoReader
    from stackctl.hub.repos import parse_repo

    repo, _, commit = place.partition("@")
    with open_hub(parse_repo(repo), again=typed(), writes=False, say=say, progress=progress) as hub:
        reader = RepoReader(hub, hub.at(commit))
        part = reader.find(member.version.digest, member.adapter.name)
        if part is None:
            raise NotFound(f"{repo} does not hold {member.label} at {commit[:12]}")
        reader.fetch(part, staged, own_folder(registry, member))
