"""The files of a checkpoint: how they are copied, and how they are known, by their digest and not by where they lie."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from stackctl.core.errors import Incompatible, NotFound, StackctlError, VerificationFailed, raise_all
from stackctl.core.schema import AdapterVersion
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, adapter_digest
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.store import Registry
from stackctl.storage.files import read_json
from stackctl.storage.hashes import DigestCache, sha256_file

# Trainer's own state (pickles, and as large as the optimizer) is of no use to an adapter; pickles are never copied.
_COPIED = {".safetensors", ".json", ".jinja", ".jsonl", ".model", ".txt", ".md"}
_TRAINER_STATE = {"trainer_state.json", "stackctl_counters.json"}


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy what belongs to an adapter: weights, configuration, tokenizer and notes; no pickles, no folders."""
    for path in sorted(source.iterdir()):
        if path.suffix in _COPIED and path.name not in _TRAINER_STATE and path.is_file() and stays_inside(path):
            shutil.copyfile(path, target / path.name)


def stays_inside(path: Path) -> bool:
    """Whether a file of a checkpoint is one, or a link to one of the same folder: no link out of it is followed.

    The Hub's cache is one place: ``snapshots/COMMIT/FILE`` is a link into ``blobs/`` beside ``snapshots/``.
    """
    if not path.is_symlink():
        return True
    folder, place = path.parent.resolve(), path.resolve()
    allowed = [folder]
    for above in folder.parents:
        if above.name == "snapshots" and above.parent.name.startswith("models--"):
            allowed.append(above.parent / "blobs")
    return any(root in place.parents for root in allowed)


def check_links(folder: Path) -> list[str]:
    """The other files of a checkpoint that are links out of its folder, and so are left out.

    Raises:
        Incompatible: its weights or its configuration are such links.
    """
    out = [path.name for path in sorted(folder.iterdir()) if path.suffix in _COPIED and not stays_inside(path)]
    if needed := [name for name in out if name in (CONFIG, WEIGHTS)]:
        raise Incompatible(
            f"{' and '.join(needed)} of {folder} are links out of that folder, which are not followed",
            hint="put the files themselves there, or give the folder that holds them",
        )
    return out


def folder_digest(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> str | None:
    """The digest of the checkpoint in a folder, fit for use or not; None where its two files are not there to read.

    Args:
        sha256: gives the ``sha256:<hex>`` of a file.
    """
    if (folder / WEIGHTS).is_file():
        with contextlib.suppress(NotFound, Incompatible):
            return adapter_digest(read_json(folder / CONFIG), sha256(folder / WEIGHTS))
    return None


def checkpoint_folders(root: Path) -> Iterator[Path]:
    """A folder and those below it that hold a checkpoint, in a fixed order."""
    for config in sorted(root.rglob(CONFIG)):
        if (config.parent / WEIGHTS).is_file():
            yield config.parent


def damaged_members(
    registry: Registry,
    members: Iterable[ResolvedMember],
    *,
    fresh: bool = False,
    read: Callable[[int], None] = lambda _: None,
) -> list[ResolvedMember]:
    """Those members whose files are missing or changed; ``fresh`` hashes even files that look unchanged.

    Args:
        read: is called with the bytes that were hashed freshly, piece by piece.
    """
    cache = DigestCache(registry.root)
    sha256 = functools.partial(sha256_file, read=read) if fresh else cache.sha256
    found = [m for m in members if folder_digest(registry.weights_path(m.version), sha256) != m.version.digest]
    cache.save()
    return found


def check_digests(
    registry: Registry,
    members: tuple[ResolvedMember, ...],
    *,
    fresh: bool = False,
    read: Callable[[int], None] = lambda _: None,
) -> None:
    """Compare every member's checkpoint with what was registered; ``fresh`` and ``read`` as of :func:`damaged_members`.

    Raises:
        VerificationFailed, NotFound: with the names of all that changed, and of all whose files are missing.
    """
    damaged = damaged_members(registry, members, fresh=fresh, read=read)
    missing = [member.label for member in damaged if not has_files(registry, member.version)]
    changed = [member.label for member in damaged if member.label not in missing]
    hint = f"stackctl verify --repair (or remove it: stackctl rm {(changed + missing + [''])[0]})"
    problems: list[StackctlError] = []
    if changed:
        what = f"the files of {', '.join(changed)} are not the ones that were registered (digests differ)"
        problems.append(VerificationFailed(what, hint=hint))
    if missing:
        problems.append(NotFound(f"the files of {', '.join(missing)} are missing", hint=hint))
    raise_all(problems)


def has_files(registry: Registry, version: AdapterVersion) -> bool:
    """Whether the files of a version are there, whatever is in them."""
    return all((registry.weights_path(version) / name).is_file() for name in (CONFIG, WEIGHTS))
