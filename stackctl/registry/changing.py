"""Every change of a registry: under its lock, weights first, then one atomic write of an entry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from stackctl.core.errors import (
    NotFound,
    Usage,
    did_you_mean,
)
from stackctl.core.expressions import Reference, parse_name, parse_stack_name
from stackctl.core.schema import (
    Adapter,
    AdapterVersion,
    Base,
    Defaults,
    HubSource,
    Member,
    Removed,
    Stack,
)
from stackctl.registry.entries import now
from stackctl.registry.resolving import ResolvedMember, ResolvedStack, Resolver, foundations
from stackctl.storage import files


class Changes(Resolver):
    """Adding, composing and choosing."""

    def check_adapter_name(self, name: str) -> str:
        """A name that a new version of an adapter may have.

        Raises:
            Usage: it is no name, reserved, or a stack's.
        """
        parse_name(name)
        if self._entry_path(Stack, name).is_file():
            raise Usage(f"'{name}' is the name of a stack", hint=f"choose another name, or: stackctl rm {name}")
        return name

    def save_base(self, base: Base) -> None:
        """Write a base's entry; the first one becomes the default.

        Raises:
            Usage: another model has that name.
        """
        parse_name(base.name, "base name")
        with self.lock():
            known = self.find_base(base.name)
            if known and known.fingerprint != base.fingerprint:
                raise Usage(
                    f"the base '{base.name}' is another model ({known.source})",
                    hint=f"choose another name, or: stackctl base rm {base.name}",
                )
            self._write(base)
            settings = self.settings()
            if settings.defaults.base is None:
                self._write_settings(msgspec.structs.replace(settings, defaults=Defaults(base=base.name)))

    def add_version(
        self,
        name: str,
        build: Callable[[int], AdapterVersion],
        staged: Path | None,
        description: str | None = None,
        *,
        number: int | None = None,
        digest: str | None = None,
    ) -> AdapterVersion:
        """Register the next version of an adapter: weights in place first, then one atomic write of the entry.

        Args:
            build: makes the version's entry for a version number (and may write into ``staged``).
            staged: the finished checkpoint in a staging folder, moved to its place; None for a link.
            number: the number that it has elsewhere, kept if it was never given here, or to the same digest; the
                same digest under that name is then the same version, and is not registered twice.
            digest: of what has a ``number``.
        """
        with self.lock():
            self.check_adapter_name(name)
            adapter = self.find_adapter(name) or Adapter(name=name, versions=[])
            removed = self.find_removed(name)
            version = build(self._next_number(adapter, removed, number, digest))
            if number is not None:
                for known in adapter.versions:
                    if known.digest == version.digest:
                        return known
            if staged is not None:
                final = self.root / version.path
                if final.exists():  # left by a process that was killed before it wrote the entry
                    files.remove_tree(final)
                files.publish_directory(staged, final)
            try:
                self._bring_back(version)
                adapter = self.find_adapter(name) or adapter
                adapter = msgspec.structs.replace(
                    adapter,
                    versions=sorted([*adapter.versions, version], key=lambda v: v.version),
                    description=adapter.description if description is None else description,
                )
                self._write(adapter)
            except OSError:  # the entry is not there, so its weights shall not fill the disk
                if staged is not None:
                    with contextlib.suppress(OSError):
                        files.remove_tree(self.root / version.path)
                raise
            self._forget(removed, {version.version})
        return version

    def find_same(self, name: str, digest: str, stack: ResolvedStack) -> AdapterVersion | None:
        """The version of an adapter that is the same bytes on the same stack."""
        adapter = self.find_adapter(name)
        wanted = (digest, stack.base.fingerprint, [str(member) for member in stack.members])
        for version in adapter.versions if adapter else ():
            if (version.digest, version.fingerprint, version.trained_on) == wanted:
                return version
        return None

    def next_number(self, name: str) -> int:
        """The number that the next version of an adapter gets."""
        adapter = self.find_adapter(name) or Adapter(name=name, versions=[])
        return self._next_number(adapter, self.find_removed(name), None, None)

    @staticmethod
    def _next_number(adapter: Adapter, removed: Removed, number: int | None, digest: str | None) -> int:
        """The number wished for if it means nothing else, else one more than was ever given."""
        given = {g.version: g.digest for g in removed.given} | {v.version: v.digest for v in adapter.versions}
        free = number is not None and given.get(number, digest) == digest
        return number if number and free else max(given, default=0) + 1

    def _bring_back(self, version: AdapterVersion) -> None:
        """Un-remove what a new version stands on: while it was trained, somebody may have removed that."""
        for name, number in {(t.reference.name, t.reference.version) for t in foundations(version)}:
            removed = self.find_removed(name)
            adapter = self.find_adapter(name) or Adapter(name=name, versions=[])
            back = [v for v in removed.versions if v.version == number]
            if back and all(v.version != number for v in adapter.versions):
                versions = sorted([*adapter.versions, *back], key=lambda v: v.version)
                self._write(msgspec.structs.replace(adapter, versions=versions))
                self._forget(removed, {number})

    def _forget(self, removed: Removed, numbers: set[int | None]) -> None:
        """What is registered again is not removed any more; its number stays given."""
        staying = [v for v in removed.versions if v.version not in numbers]
        if staying != removed.versions:
            self._write(msgspec.structs.replace(removed, versions=staying))

    def record_push(self, member: ResolvedMember, place: HubSource) -> None:
        """Remember where a version lives on the Hub."""
        with self.lock():
            adapter = self.resolve_adapter(Reference(member.adapter.name, member.version.version)).adapter
            versions = [
                msgspec.structs.replace(v, pushed=place) if v.version == member.version.version else v
                for v in adapter.versions
            ]
            if versions != adapter.versions:
                self._write(msgspec.structs.replace(adapter, versions=versions))

    def put_stack(self, stack: Stack) -> Stack | None:
        """Write the entry of a stack that was composed elsewhere; the current stack stays. Returns what it replaced.

        Raises:
            Usage: the name is an adapter's.
        """
        parse_stack_name(stack.name)
        with self.lock():
            if "+" not in stack.name and self._entry_path(Adapter, stack.name).is_file():
                raise Usage(f"'{stack.name}' is the name of an adapter", hint="choose another name with --name")
            known = self.find_stack(stack.name)
            if known != stack:
                self._write(stack)
        return known

    def relative_weights_path(self, name: str, number: int) -> str:
        return f"weights/{name}/{number}"

    def save_stack(self, name: str, stack: ResolvedStack) -> Stack:
        """Write a stack's entry and make it the current one.

        Raises:
            Usage: the name is an adapter's, or another expression's.
        """
        parse_stack_name(name)
        if "+" in name and name != stack.default_name:
            raise Usage(
                f"'{name}' reads as an expression, and not as the one it would name",
                hint=f"use a name without '+', or leave out --name: it is then called {stack.default_name}",
            )
        with self.lock():
            if "+" not in name and self._entry_path(Adapter, name).is_file():
                raise Usage(f"'{name}' is the name of an adapter", hint="choose another name with --name")
            for member in stack.members:  # under the lock, so that none is removed meanwhile
                self.resolve_adapter(Reference(member.adapter.name, member.version.version))
            members = [
                Member(adapter=m.adapter.name, version=m.version.version, digest=m.version.digest, weight=m.weight)
                for m in stack.members
            ]
            entry = Stack(
                name=name,
                base=stack.base.name,
                fingerprint=stack.base.fingerprint,
                method=stack.method,
                options=stack.options,
                members=members,
                created=now(),
            )
            known = self.find_stack(name)
            if known and msgspec.structs.replace(known, created=entry.created) == entry:
                entry = known
            else:
                self._write(entry)
            self._set_current(name)
        return entry

    def _set_current(self, name: str | None) -> None:
        settings = self.settings()
        if settings.current != name:
            self._write_settings(msgspec.structs.replace(settings, current=name))

    def use(self, name: str) -> Stack:
        """Make a stored stack the current one."""
        with self.lock():
            stack = self.find_stack(name)
            if not stack:
                if self.find_adapter(name):
                    raise NotFound(f"'{name}' is an adapter, and no stack", hint=f"stackctl compose {name}")
                near = did_you_mean(name, self.names(Stack), "stackctl ls shows what there is")
                raise NotFound(f"there is no stack '{name}'", hint=near)
            self._set_current(name)
        return stack

    def remove_base(self, name: str) -> None:
        """Remove a base's entry (never its files).

        Raises:
            NotFound, Usage: it is not there, or adapters stand on it.
        """
        with self.lock():
            self.base(name)
            users = [f"{a.name}@{v.version}" for a in self.adapter_rows() for v in a.versions if v.base == name]
            users += [stack.name for stack in self.stack_rows() if stack.base == name and not stack.members]
            if users:
                raise Usage(
                    f"the base '{name}' cannot be removed: {', '.join(users)} depend on it",
                    hint=f"remove them first: stackctl rm {users[0].partition('@')[0]}",
                )
            self._entry_path(Base, name).unlink()
            settings = self.settings()
            if settings.defaults.base == name:
                self._write_settings(msgspec.structs.replace(settings, defaults=Defaults()))
