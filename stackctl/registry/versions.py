"""Versions of adapters: weights in place first, then one atomic write of the entry, under the registry's lock."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.expressions import parse_name
from stackctl.core.provenance import HubSource
from stackctl.core.schema import Adapter, AdapterVersion, Base, GivenNumber, Removed, Stack
from stackctl.lora.checkpoint import Checkpoint, read_checkpoint
from stackctl.lora.lora_config import describe_lora
from stackctl.registry.adapters import ResolvedMember, foundations, resolve_adapter, with_versions
from stackctl.registry.checkpoint_files import folder_digest
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry, now
from stackctl.storage import atomic, files


def version_facts(registry: Registry, name: str, version: AdapterVersion, base: str) -> dict[str, object]:
    """What ``--json`` says of a version that is registered now or was already; ``base`` as it was named."""
    return {
        "adapter": name,
        "version": version.version,
        "digest": version.digest,
        "base": base,
        "path": str(registry.weights_path(version)),
        "on": version.trained_on,
    }


def check_adapter_name(registry: Registry, name: str) -> str:
    """A name that a new version of an adapter may have.

    Raises:
        Usage: it is no name, reserved, or a stack's.
    """
    parse_name(name)
    if registry.has(Stack, name):
        raise Usage(f"'{name}' is the name of a stack", hint=f"choose another name, or: stackctl rm {name}")
    return name


def add_version(
    registry: Registry,
    name: str,
    build: Callable[[int], AdapterVersion],
    staged: Path | None,
    description: str | None = None,
    given: GivenNumber | None = None,
) -> AdapterVersion:
    """Register the next version of an adapter: weights in place first, then one atomic write of the entry.

    Args:
        build: makes the version's entry for a version number (and may write into ``staged``).
        staged: the finished checkpoint in a staging folder, moved to its place; None for a link.
        given: the number that it has elsewhere, kept if it was never given here, or to the same digest; the
            same digest under that name is then the same version, and is not registered twice.

    A number under which other weights lie is passed over.
    """
    with registry.lock():
        check_adapter_name(registry, name)
        adapter = registry.find_adapter(name) or Adapter(name=name, versions=[])
        numbers = _free_numbers(adapter, registry.find_removed(name), given)
        version = next(
            one for one in map(build, numbers) if staged is None or not _is_anothers(registry, one.path, one.digest)
        )
        if given is not None:
            for known in adapter.versions:
                if known.digest == version.digest:
                    return known
        if staged is not None:
            final = registry.root / version.path
            if final.exists():  # left by a process that was killed before it wrote this very entry
                files.remove_tree(final)
            atomic.publish_directory(staged, final)
        try:
            if description is not None:
                adapter = msgspec.structs.replace(adapter, description=description)
            registry.write(*_with_foundations(registry, adapter, version))
        except OSError:  # the entry is not there, so its weights shall not fill the disk
            if staged is not None:
                with contextlib.suppress(OSError):
                    files.remove_tree(registry.root / version.path)
            raise
    return version


@dataclass(frozen=True)
class NewVersion:
    """What a checkpoint that was made elsewhere is registered as: its name, its base, and what it stands on there."""

    name: str
    base: Base
    on: list[str]
    description: str = ""


def register_checkpoint(registry: Registry, new: NewVersion, staged: Path, **facts: object) -> AdapterVersion:
    """Register the finished checkpoint in a staging folder, which is moved to its place.

    Args:
        facts: fields of its entry besides those that the checkpoint tells.
    """
    checkpoint = read_checkpoint(staged)

    def build(number: int) -> AdapterVersion:
        path = registry.relative_weights_path(new.name, number)
        return msgspec.structs.replace(entry_of(number, path, checkpoint, new.base, new.on), **facts)

    return add_version(registry, new.name, build, staged, new.description or None)


def find_same_version(registry: Registry, name: str, digest: str, stack: ResolvedStack) -> AdapterVersion | None:
    """The version of an adapter that is the same bytes on the same stack."""
    adapter = registry.find_adapter(name)
    wanted = (digest, stack.base.fingerprint, stack.terms())
    versions = adapter.versions if adapter else ()
    return next((v for v in versions if (v.digest, v.fingerprint, v.trained_on) == wanted), None)


def next_number(registry: Registry, name: str) -> int:
    """The number that the next version of an adapter gets."""
    adapter = registry.find_adapter(name) or Adapter(name=name, versions=[])
    numbers = _free_numbers(adapter, registry.find_removed(name), None)
    return next(one for one in numbers if not _is_anothers(registry, registry.relative_weights_path(name, one)))


def _free_numbers(adapter: Adapter, removed: Removed, wished: GivenNumber | None) -> Iterator[int]:
    """The number wished for if it means nothing else, then those above all that were ever given."""
    given = {g.version: g.digest for g in removed.given} | {v.version: v.digest for v in adapter.versions}
    if wished and wished.version and given.get(wished.version, wished.digest) == wished.digest:
        yield wished.version
    yield from itertools.count(max(given, default=0) + 1)


def _is_anothers(registry: Registry, path: str, digest: str = "") -> bool:
    """Whether weights lie there that have another digest: those of a branch of git that is not checked out, whose
    entries are not here, or of a process that was killed before it wrote one.
    """
    return folder_digest(registry.root / path) not in (None, digest)


def _with_foundations(registry: Registry, adapter: Adapter, new: AdapterVersion) -> list[Adapter | Removed]:
    """The entries that a new version of an adapter changes, in the order in which they are put in place.

    What it stands on is un-removed: while it was trained, somebody may have removed that. What is registered again is
    not removed any more; its number stays given.
    """
    adapters = {adapter.name: adapter}
    removed = {adapter.name: registry.find_removed(adapter.name)}
    for reference in {term.reference for term in foundations(new)}:
        name = reference.name
        known = adapters.get(name) or registry.find_adapter(name) or Adapter(name=name, versions=[])
        gone = removed.get(name) or registry.find_removed(name)
        version = gone.numbered(reference.version)
        if version and not known.numbered(reference.version):
            adapters[name], removed[name] = with_versions(known, version), gone
    own = adapters.pop(adapter.name)
    adapters[own.name] = with_versions(own, new)  # after what it stands on
    forgotten = []
    for name, gone in removed.items():
        registered = {v.version for v in adapters[name].versions}
        staying = [v for v in gone.versions if v.version not in registered]
        if staying != gone.versions:
            forgotten.append(msgspec.structs.replace(gone, versions=staying))
    return [*adapters.values(), *forgotten]


def record_push(registry: Registry, member: ResolvedMember, place: HubSource) -> None:
    """Remember where a version lives on the Hub."""
    with registry.lock():
        found = resolve_adapter(registry, member.reference)
        if found.version.pushed != place:
            registry.write(with_versions(found.adapter, msgspec.structs.replace(found.version, pushed=place)))


def entry_of(number: int, path: str, checkpoint: Checkpoint, base: Base, on: list[str]) -> AdapterVersion:
    """The registry entry of a checkpoint: what its own files tell."""
    return AdapterVersion(
        version=number,
        digest=checkpoint.digest(),
        path=path,
        base=base.name,
        fingerprint=base.fingerprint,
        trained_on=on,
        created=now(),
        lora=describe_lora(checkpoint.config),
        parameters=checkpoint.parameters,
        dtype=checkpoint.dtype,
        bytes=checkpoint.bytes,
        versions={"peft": str(checkpoint.config["peft_version"])} if checkpoint.config.get("peft_version") else {},
    )
