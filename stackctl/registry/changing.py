"""Every change of a registry: under its lock, weights first, then one atomic write of an entry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from stackctl import files
from stackctl.errors import (
    NotFound,
    Usage,
    did_you_mean,
)
from stackctl.names import BASE, Reference, parse_expression, parse_name, parse_stack_name
from stackctl.registry.entries import now
from stackctl.registry.resolving import ResolvedMember, ResolvedStack, Resolver, foundations
from stackctl.schema import (
    Adapter,
    AdapterVersion,
    Base,
    Defaults,
    HubSource,
    Member,
    Stack,
)


class Changes(Resolver):
    """Adding, composing, choosing and removing."""

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
    ) -> AdapterVersion:
        """Register the next version of an adapter: weights in place first, then one atomic write of the entry.

        Args:
            build: makes the version's entry for a version number (and may write into ``staged``).
            staged: the finished checkpoint in a staging folder, moved to its place; None for a link.
            number: the number that it has elsewhere, kept if it is free here; the same digest under that name is
                then the same version, and is not registered twice.
        """
        with self.lock():
            self.check_adapter_name(name)
            adapter = self.find_adapter(name) or Adapter(name=name, versions=[])
            taken = {version.version for version in adapter.versions}
            chosen = number if number and number not in taken else max(taken, default=0) + 1
            version = build(chosen)
            if number is not None:
                for known in adapter.versions:
                    if known.digest == version.digest:
                        return known
            if staged is not None:
                final = self.root / version.path
                if final.exists():  # left by a process that was killed before it wrote the entry
                    files.remove_tree(final)
                files.publish_directory(staged, final)
            adapter = msgspec.structs.replace(
                adapter,
                versions=sorted([*adapter.versions, version], key=lambda v: v.version),
                description=adapter.description if description is None else description,
            )
            self._write(adapter)
        return version

    def find_digest(self, digest: str) -> ResolvedMember | None:
        """The adapter version with that digest, under whatever name."""
        for adapter in self.adapters():
            for version in adapter.versions:
                if version.digest == digest:
                    return ResolvedMember(adapter, version, 1.0)
        return None

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
                near = did_you_mean(name, self.names(Stack), f"compose it first: stackctl compose {name}")
                raise NotFound(f"there is no stack '{name}'", hint=near)
            self._set_current(name)
        return stack

    def remove(self, text: str) -> list[str]:
        """Remove a stack, an adapter or one version of it. Returns what was removed.

        Raises:
            NotFound: it is not there.
            Usage: something stands on it.
        """
        with self.lock():
            if "@" not in text and text != BASE and (stack := self.find_stack(text)):
                self._entry_path(Stack, stack.name).unlink()
                if self.settings().current == stack.name:
                    self._set_current(None)
                return [stack.name]
            terms = parse_expression(text)
            if len(terms) != 1 or terms[0].weight != 1:
                raise Usage(f"'{text}' is not one adapter or stack", hint="name one: stackctl rm style@1")
            return self._remove_versions(terms[0].reference)

    def _remove_versions(self, reference: Reference) -> list[str]:
        if not self._entry_path(Adapter, reference.name).is_file() and self.find_base(reference.name):
            raise Usage(f"'{reference.name}' is a base", hint=f"stackctl base rm {reference.name}")
        adapter = self.resolve_adapter(reference).adapter
        going = [v for v in adapter.versions if reference.version in (None, v.version)]
        labels = {f"{adapter.name}@{v.version}" for v in going}
        users = self._standing_on(labels)
        if users:
            raise Usage(
                f"{' and '.join(sorted(labels))} cannot be removed: {', '.join(users)} stand on it",
                hint=f"remove them first: stackctl rm {users[0]}",
            )
        staying = [v for v in adapter.versions if v not in going]
        if staying:
            self._write(msgspec.structs.replace(adapter, versions=staying))
        else:
            self._entry_path(Adapter, adapter.name).unlink()
        for version in going:
            # Not what the entry's path says: a link's files belong to somebody else.
            folder = self.root / self.relative_weights_path(adapter.name, version.version)
            if folder.exists():
                files.remove_tree(folder)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()
        return [f"{adapter.name}@{v.version}" for v in going]

    def _standing_on(self, labels: set[str]) -> list[str]:
        users = [
            f"{adapter.name}@{version.version}"
            for adapter in self.adapters()
            for version in adapter.versions
            if f"{adapter.name}@{version.version}" not in labels
            and any(str(term.reference) in labels for term in foundations(version))
        ]
        users += [
            stack.name for stack in self.stacks() if any(f"{m.adapter}@{m.version}" in labels for m in stack.members)
        ]
        return users

    def remove_base(self, name: str) -> None:
        """Remove a base's entry (never its files).

        Raises:
            NotFound, Usage: it is not there, or adapters stand on it.
        """
        with self.lock():
            self.base(name)
            users = [f"{a.name}@{v.version}" for a in self.adapters() for v in a.versions if v.base == name]
            users += [stack.name for stack in self.stacks() if stack.base == name and not stack.members]
            if users:
                raise Usage(
                    f"the base '{name}' cannot be removed: {', '.join(users)} stand on it",
                    hint=f"remove them first: stackctl rm {users[0].partition('@')[0]}",
                )
            self._entry_path(Base, name).unlink()
            settings = self.settings()
            if settings.defaults.base == name:
                self._write_settings(msgspec.structs.replace(settings, defaults=Defaults()))
