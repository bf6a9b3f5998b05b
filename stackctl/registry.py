"""The only reader and writer of ``registry/``.

One small file per thing, so that a name resolves by reading one file and a change is one atomic replace. Weights
are put in place first, the entry is written last: what has no entry does not exist.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from stackctl import files
from stackctl.checkpoint import adapter_digest, read_checkpoint
from stackctl.digests import DigestCache
from stackctl.errors import Incompatible, NotFound, StackctlError, Usage, VerificationFailed, did_you_mean
from stackctl.methods import SUM, check_method
from stackctl.names import (
    BASE,
    Reference,
    Term,
    format_term,
    parse_expression,
    parse_name,
    parse_stack_name,
)
from stackctl.plan import PlanMember, StackPlan, plan_stack
from stackctl.schema import (
    SCHEMA,
    Adapter,
    AdapterVersion,
    Base,
    Defaults,
    HubSource,
    Member,
    MethodOptions,
    RegistryFile,
    Stack,
)
from stackctl.yamlfile import Flow, format_yaml, read_yaml

E = TypeVar("E", Base, Adapter, Stack)
_FILE = "registry.yaml"
_FOLDERS: dict[type, str] = {Base: "bases", Adapter: "adapters", Stack: "stacks"}
_IGNORED_BY_GIT = ("weights/", "runs/", ".lock", ".tmp-*", ".digests.json")


@dataclass(frozen=True)
class ResolvedMember:
    """One adapter version of an expression, with its weight."""

    adapter: Adapter
    version: AdapterVersion
    weight: float

    @property
    def label(self) -> str:
        return f"{self.adapter.name}@{self.version.version}"

    def __str__(self) -> str:
        return format_term(self.label, self.weight)


@dataclass(frozen=True)
class ResolvedStack:
    """An expression with every name found and pinned. ``name`` is that of a stored stack, else None."""

    text: str
    base: Base
    members: tuple[ResolvedMember, ...]
    name: str | None = None
    notes: tuple[str, ...] = ()
    method: str = SUM
    options: MethodOptions = field(default_factory=MethodOptions)

    @property
    def pinned(self) -> str:
        return "+".join(str(member) for member in self.members) or BASE

    @property
    def default_name(self) -> str:
        """The expression's names joined by '+', which is what an unnamed stack is called."""
        return "+".join(member.adapter.name for member in self.members) or BASE


def find_registry(explicit: Path | None) -> Path:
    """The registry in use: what was asked for, else ``STACKCTL_REGISTRY``, else the nearest one upward.

    Raises:
        NotFound: there is none.
    """
    asked = explicit or (Path(value) if (value := os.environ.get("STACKCTL_REGISTRY")) else None)
    if asked is not None:
        for folder in (asked, asked / "registry"):
            if (folder / _FILE).is_file():
                return folder.resolve()
        raise NotFound(f"there is no registry in {asked}", hint=f"stackctl init {asked}")
    here = Path.cwd()
    for parent in (here, *here.parents):
        for folder in (parent / "registry", parent):
            if (folder / _FILE).is_file():
                return folder.resolve()
    raise NotFound("there is no registry here or in a folder above", hint="stackctl init")


def init_registry(folder: Path) -> bool:
    """Make an empty registry; False when one is there already (which is left as it is)."""
    if (folder / _FILE).is_file():
        return False
    if folder.exists() and not folder.is_dir():
        raise Usage(f"{folder} is a file", hint="choose another folder")
    for name in _FOLDERS.values():
        (folder / name).mkdir(parents=True, exist_ok=True)
    _ignore_in_git(folder / ".gitignore")
    files.write_atomic(folder / _FILE, format_yaml({"schema": SCHEMA, "current": None, "defaults": {}}))
    return True


def _ignore_in_git(path: Path) -> None:
    """Keep weights out of git; what somebody's ``.gitignore`` says already stays."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    missing = [line for line in _IGNORED_BY_GIT if line not in text.splitlines()]
    if missing:
        start = text if not text or text.endswith("\n") else text + "\n"
        files.write_atomic(path, start + "\n".join(missing) + "\n")


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Registry:
    """A registry on disk. Nothing is kept in memory: every question reads the file that answers it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def open(cls, explicit: Path | None = None) -> Registry:
        return cls(find_registry(explicit))

    # -- entries ------------------------------------------------------------------------------------------------

    def _entry_path(self, kind: type, name: str) -> Path:
        return self.root / _FOLDERS[kind] / f"{name}.yaml"

    def _read(self, kind: type[E], name: str) -> E | None:
        path = self._entry_path(kind, name)
        if not path.is_file():
            return None
        entry = read_yaml(path, kind, schema=SCHEMA)
        if entry.name != name:
            raise Usage(
                f"{path}: its name is '{entry.name}'", hint=f"name the file {entry.name}.yaml, or mend the name"
            )
        if isinstance(entry, Stack):
            check_method(entry.method, entry.options)
        if isinstance(entry, Adapter):
            numbers = [version.version for version in entry.versions]
            if not numbers or numbers != sorted(set(numbers)) or numbers[0] < 1:
                raise Usage(f"{path}: versions must be there, distinct and ascending", hint="mend the file")
        return entry

    def _write(self, entry: Base | Adapter | Stack) -> None:
        value = msgspec.to_builtins(entry)
        files.write_atomic(self._entry_path(type(entry), entry.name), format_yaml(_on_one_line(value)))

    def names(self, kind: type) -> list[str]:
        """The names of all entries of a kind, in alphabetical order, without reading them."""
        return sorted(path.name.removesuffix(".yaml") for path in (self.root / _FOLDERS[kind]).glob("[!.]*.yaml"))

    def bases(self) -> Iterator[Base]:
        return (entry for name in self.names(Base) if (entry := self._read(Base, name)))

    def adapters(self) -> Iterator[Adapter]:
        return (entry for name in self.names(Adapter) if (entry := self._read(Adapter, name)))

    def stacks(self) -> Iterator[Stack]:
        return (entry for name in self.names(Stack) if (entry := self._read(Stack, name)))

    def find_base(self, name: str) -> Base | None:
        return self._read(Base, parse_name(name, "base name"))

    def find_adapter(self, name: str) -> Adapter | None:
        return self._read(Adapter, parse_name(name))

    def find_stack(self, name: str) -> Stack | None:
        return self._read(Stack, parse_stack_name(name))

    def settings(self) -> RegistryFile:
        return read_yaml(self.root / _FILE, RegistryFile, schema=SCHEMA)

    def _write_settings(self, settings: RegistryFile) -> None:
        files.write_atomic(self.root / _FILE, format_yaml(msgspec.to_builtins(settings)))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the registry for writing. Readers need no lock: every file is replaced whole."""
        with files.locked(self.root / ".lock", "the registry"):
            yield

    # -- resolving ----------------------------------------------------------------------------------------------

    def base(self, name: str | None = None) -> Base:
        """A base by name; without a name the default one, or the only one there is.

        Raises:
            NotFound, Usage: it is not there, or several are and none is the default.
        """
        if name is not None and name != BASE:
            found = self.find_base(name)
            if not found:
                raise NotFound(
                    f"there is no base '{name}'",
                    hint=did_you_mean(name, self.names(Base), f"register it: stackctl base add {name} SOURCE"),
                )
            return found
        default = self.settings().defaults.base
        names = self.names(Base)
        if default and default in names:
            return self.base(default)
        if len(names) == 1:
            return self.base(names[0])
        if not names:
            raise NotFound("no base is registered", hint="stackctl base add smollm2")
        raise Usage(f"there are several bases: {', '.join(names)}", hint=f"say which one: --base {names[0]}")

    def resolve_adapter(self, reference: Reference) -> ResolvedMember:
        """An adapter version; without a version the newest.

        Raises:
            NotFound: no such adapter, or not in that version.
        """
        adapter = self.find_adapter(reference.name)
        if not adapter:
            raise self._not_found(reference.name)
        if reference.version is None:
            return ResolvedMember(adapter, adapter.newest(), 1.0)
        for version in adapter.versions:
            if version.version == reference.version:
                return ResolvedMember(adapter, version, 1.0)
        have = ", ".join(str(v.version) for v in adapter.versions)
        raise NotFound(
            f"there is no {reference}; '{adapter.name}' has version {have}",
            hint=f"use {adapter.name}@{adapter.newest().version}",
        )

    def _not_found(self, name: str) -> NotFound:
        known = [*self.names(Adapter), *self.names(Stack), *self.names(Base)]
        return NotFound(
            f"there is no adapter, stack or base '{name}'",
            hint=did_you_mean(name, known, "stackctl ls shows what there is"),
        )

    def resolve(self, text: str | None = None, *, base: str | None = None, fresh: bool = False) -> ResolvedStack:
        """Find and pin everything that an expression names; None means the current stack.

        ``style+instruct`` that is also a stored stack's name means that stack, as pinned; with ``fresh`` it is read as
        an expression all the same, which is how one composes it again.

        Raises:
            NotFound, Usage, Incompatible: a name is missing, the text is no expression, the bases differ.
        """
        if text is None:
            text = self.current()
        resolved = self._resolve(text, base, fresh)
        if base is not None and base != BASE and resolved.base.name != base:
            raise Incompatible(
                f"'{text}' stands on the base '{resolved.base.name}', not on '{base}'",
                hint=f"leave out --base, or train on {base}",
            )
        return resolved

    def current(self) -> str:
        current = self.settings().current
        if current is None:
            raise Usage("no stack was named and there is no current one", hint="stackctl compose style+instruct")
        return current

    def _resolve(self, text: str, base: str | None, fresh: bool) -> ResolvedStack:
        terms = parse_expression(text)
        if not (fresh and "+" in text) and (stored := self._stored(text)):
            members = tuple(self._pinned_members(stored))
            notes, base_entry = tuple(_newer(members)), self._stack_base(stored)
            return ResolvedStack(text, base_entry, members, stored.name, notes, stored.method, stored.options)
        if not terms:
            return ResolvedStack(text, self.base(base), ())
        only = terms[0].reference
        is_name = len(terms) == 1 and only.version is None and terms[0].weight == 1
        if is_name and not self._is_taken(only.name) and (named := self.find_base(only.name)):
            return ResolvedStack(text, named, ())
        members = tuple(member for term in terms for member in self._expand(term))
        bases = {member.version.base for member in members}
        if len(bases) > 1:
            which = ", ".join(f"{m.label} on {m.version.base}" for m in members)
            raise Incompatible(f"the members stand on different bases: {which}", hint="use adapters of one base")
        return ResolvedStack(text, self.base(bases.pop()), members)

    def _stored(self, text: str) -> Stack | None:
        """The stored stack that an expression is the name of."""
        try:
            parse_stack_name(text)
        except Usage:
            return None
        return self.find_stack(text)

    def _is_taken(self, name: str) -> bool:
        return self._entry_path(Adapter, name).is_file() or self._entry_path(Stack, name).is_file()

    def _stack_base(self, stack: Stack) -> Base:
        base = self.base(stack.base)
        if base.fingerprint != stack.fingerprint:
            raise Incompatible(
                f"the stack '{stack.name}' was composed on another model than the base '{base.name}' now is",
                hint="register that model under its own name, and compose again",
            )
        return base

    def _expand(self, term: Term) -> list[ResolvedMember]:
        """A term's members: the adapter, or a named stack's members with their weights multiplied."""
        name = term.reference.name
        if not self._entry_path(Adapter, name).is_file() and (stack := self.find_stack(name)):
            if term.reference.version is not None:
                raise Usage(f"'{term.reference}': a stack has no versions", hint=f"write {name}")
            if stack.method != SUM:
                raise Incompatible(
                    f"the stack '{name}' is composed by {stack.method} and cannot be a term of a sum",
                    hint="write out its members: " + "+".join(m.adapter for m in stack.members),
                )
            members = [replace(m, weight=m.weight * term.weight) for m in self._pinned_members(stack)]
            if not all(math.isfinite(member.weight) for member in members):
                raise Usage(f"the weights of '{term}' are not finite numbers", hint="use a smaller weight")
            return members
        return [replace(self.resolve_adapter(term.reference), weight=term.weight)]

    def _pinned_members(self, stack: Stack) -> Iterator[ResolvedMember]:
        for member in stack.members:
            found = self.resolve_adapter(Reference(member.adapter, member.version))
            if found.version.digest != member.digest:
                raise VerificationFailed(
                    f"{found.label} is not the one that the stack '{stack.name}' was composed of (digests differ)",
                    hint=f"stackctl compose {'+'.join(m.adapter for m in stack.members)} --name {stack.name}",
                )
            yield replace(found, weight=member.weight)

    # -- plans --------------------------------------------------------------------------------------------------

    def weights_path(self, version: AdapterVersion) -> Path:
        """Where a version's checkpoint lies, absolute."""
        return (self.root / version.path).resolve()

    def plan(self, stack: ResolvedStack) -> StackPlan:
        """The plan of a resolved stack, from its entries and its members' headers.

        Raises:
            NotFound, Incompatible, VerificationFailed: a checkpoint is missing or cannot be read.
        """
        members = [self._plan_member(member) for member in stack.members]
        return plan_stack(stack.base, members, stack.method, stack.options)

    def _plan_member(self, member: ResolvedMember) -> PlanMember:
        version = member.version
        try:
            checkpoint = read_checkpoint(self.weights_path(version))
        except NotFound as error:
            raise NotFound(
                f"the weights of {member.label} are missing: {error.message}",
                hint=f"restore {version.path}, or remove the version: stackctl rm {member.label}",
            ) from None
        return PlanMember(
            label=member.label, weight=member.weight, checkpoint=checkpoint, adapter=member.adapter.name,
            version=version.version, digest=version.digest, base=version.base, fingerprint=version.fingerprint,
            trained_on=tuple(version.trained_on),
        )  # fmt: skip

    def check_digests(self, members: tuple[ResolvedMember, ...], *, fresh: bool = False) -> None:
        """Compare every member's checkpoint with what was registered; ``fresh`` hashes even files that look unchanged.

        Raises:
            VerificationFailed: with the names of all that changed.
        """
        cache = DigestCache(self.root)
        changed = []
        for member in members:
            checkpoint = read_checkpoint(self.weights_path(member.version))
            weights = files.sha256_file(checkpoint.weights_path) if fresh else cache.sha256(checkpoint.weights_path)
            if adapter_digest(checkpoint.config, weights) != member.version.digest:
                changed.append(member.label)
        cache.save()
        if changed:
            raise VerificationFailed(
                f"the files of {', '.join(changed)} are not the ones that were registered (digests differ)",
                hint=f"restore them, or remove and register again: stackctl rm {changed[0]}",
            )

    # -- changing -----------------------------------------------------------------------------------------------

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
            and any(str(term.reference) in labels for term in _foundations(version))
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

    # -- verifying ----------------------------------------------------------------------------------------------

    def verify(
        self, only: set[str] | None = None, progress: Callable[[str], None] = lambda _: None
    ) -> tuple[int, list[dict[str, str]]]:
        """Rehash everything registered, or only the labels given.

        Returns:
            how many things were checked, and every problem found as ``{"what", "message"}``.
        """
        problems: list[dict[str, str]] = []
        checked = 0

        def attempt(what: str, check: Callable[[], Any]) -> Any:
            try:
                return check()
            except StackctlError as error:
                problems.append({"what": what, "message": error.message})
                return None

        if only is None:
            attempt("registry", self.settings)
            for kind in (Base, Stack):
                for name in self.names(kind):
                    checked += 1
                    entry = attempt(name, lambda k=kind, n=name: self._read(k, n))  # type: ignore[misc]
                    if isinstance(entry, Stack):
                        attempt(name, lambda e=entry: (list(self._pinned_members(e)), self._stack_base(e)))  # type: ignore[misc]
        for name in self.names(Adapter):
            if only is not None and not any(label.partition("@")[0] == name for label in only):
                continue
            adapter = attempt(name, lambda n=name: self._read(Adapter, n))  # type: ignore[misc]
            for version in adapter.versions if adapter else ():
                label = f"{name}@{version.version}"
                if only is None or label in only:
                    progress(label)
                    checked += 1
                    member = ResolvedMember(adapter, version, 1.0)
                    attempt(label, lambda m=member: self._verify_version(m))  # type: ignore[misc]
        return checked, problems

    def _verify_version(self, member: ResolvedMember) -> None:
        self._plan_member(member)
        self.check_digests((member,), fresh=True)
        base = self.base(member.version.base)
        if base.fingerprint != member.version.fingerprint:
            raise Incompatible(f"{member.label} was trained on another model than the base '{base.name}' now is")
        for term in _foundations(member.version):
            self.resolve_adapter(term.reference)


def _foundations(version: AdapterVersion) -> tuple[Term, ...]:
    return parse_expression("+".join(version.trained_on)) if version.trained_on else ()


def _newer(members: tuple[ResolvedMember, ...]) -> Iterator[str]:
    for member in members:
        name, newest = member.adapter.name, member.adapter.newest().version
        if newest > member.version.version:
            yield f"{member.label} is used as composed; {name}@{newest} is newer (compose again to take it)"


def _on_one_line(value: Any, depth: int = 0) -> Any:
    """Small mappings without mappings inside are written on one line, which people and diffs read best."""
    if isinstance(value, dict):
        inner = {key: _on_one_line(item, depth + 1) for key, item in value.items()}
        flat = depth > 1 and inner and not any(isinstance(item, dict) for item in inner.values())
        return Flow(inner) if flat and len(str(inner)) < 400 else inner
    if isinstance(value, list):
        return [_on_one_line(item, depth + (0 if isinstance(item, dict) else 1)) for item in value]
    return value
