"""Files of registered versions that are missing or changed, and how they come back.

A version is its digest: whatever has the digest is the version, wherever it was found. So nothing is put in place that
has not been hashed, and no entry changes, but for that of a link, whose files are the registry's own from then on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import msgspec

from stackctl.core.errors import NotFound, StackctlError, VerificationFailed
from stackctl.core.schema import AdapterVersion, Removed
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, adapter_digest, read_config
from stackctl.registry.adapters import ResolvedMember, registered_versions, resolve_adapter, with_versions
from stackctl.registry.checkpoint_files import damaged_members, folder_digest
from stackctl.registry.garbage_collection import unreferenced_weights
from stackctl.registry.store import Registry
from stackctl.storage import atomic
from stackctl.storage.hashes import DigestCache, sha256_file


def find_copies(registry: Registry, digests: Collection[str]) -> dict[str, list[Path]]:
    """Whole checkpoints of this registry with these digests: of other entries, removed ones, or left by a kill."""
    versions = list(_all_versions(registry))
    cache = DigestCache(registry.root)
    found: dict[str, list[Path]] = {}

    def look(folders: Iterable[Path]) -> None:
        for folder in folders:
            digest = folder_digest(folder, cache.sha256)
            if digest is not None and digest in digests:
                found.setdefault(digest, []).append(folder)

    look(dict.fromkeys(registry.weights_path(version) for version in versions if version.digest in digests))
    if len(found) < len(set(digests)):
        look(unreferenced_weights(registry, {registry.weights_path(version) for version in versions}))
    cache.save()
    return found


def _all_versions(registry: Registry) -> Iterator[AdapterVersion]:
    """Registered and removed ones; an entry that cannot be read is passed over."""
    for name in registry.names(Removed):
        with contextlib.suppress(StackctlError):
            yield from registry.find_removed(name).versions
    yield from registered_versions(registry)


def own_folder(registry: Registry, member: ResolvedMember) -> Path:
    """Where a version's files lie when they are the registry's own; for a link, where they will be once restored."""
    return registry.root / registry.relative_weights_path(member.adapter.name, member.version.version)


def restore_files(registry: Registry, member: ResolvedMember, staged: Path) -> None:
    """Put files that were brought back into a version's place; what is right there stays as it is.

    Args:
        staged: a staging folder with the configuration, with the weights unless those in place are right, and with
            others of its files, which are only put where there are none.

    Raises:
        VerificationFailed: they are not the ones that were registered.
        NotFound: the version was removed meanwhile.
    """
    folder, digest = own_folder(registry, member), member.version.digest
    in_place = sha256_file(folder / WEIGHTS) if (folder / WEIGHTS).is_file() else None
    brought = sha256_file(staged / WEIGHTS) if (staged / WEIGHTS).is_file() else in_place
    if brought is None or adapter_digest(read_config(staged), brought) != digest:
        raise VerificationFailed(f"it is not the {member.label} that was registered (digests differ)")
    with registry.lock():
        now = resolve_adapter(registry, member.reference)
        if now.version.digest != digest:
            raise NotFound(f"{member.label} was removed meanwhile")
        if not damaged_members(registry, (now,)):
            return  # somebody else was quicker
        if folder.is_dir():
            _merge(staged, folder, digest, brought, has_weights=brought == in_place)
        else:
            atomic.publish_directory(staged, folder)
        # The entry of a link: where it led, the files were missing or somebody's own by now.
        own = registry.relative_weights_path(now.adapter.name, now.version.version)
        if now.version.path != own:
            registry.write(with_versions(now.adapter, msgspec.structs.replace(now.version, path=own)))


def _merge(staged: Path, folder: Path, digest: str, weights: str, *, has_weights: bool) -> None:
    """What is missing or wrong in a folder, the weights next to last; a kill in between is mended by doing it again."""
    for path in sorted(staged.iterdir()):
        if path.name not in (CONFIG, WEIGHTS) and not (folder / path.name).exists():
            atomic.put_in_place(path, folder / path.name)
    if not has_weights:
        atomic.put_in_place(staged / WEIGHTS, folder / WEIGHTS)
    if folder_digest(folder, lambda _: weights) != digest:
        atomic.put_in_place(staged / CONFIG, folder / CONFIG)
