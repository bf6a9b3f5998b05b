"""Names and expressions to pinned versions, and those to plans. Reads entries and headers, changes nothing."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from stackctl.core.errors import (
    Incompatible,
    NotFound,
    StackctlError,
    Usage,
    VerificationFailed,
    did_you_mean,
    gathering,
    raise_all,
)
from stackctl.core.expressions import BASE, Reference, Term, format_term, parse_expression, parse_stack_name
from stackctl.core.schema import (
    Adapter,
    AdapterVersion,
    Base,
    MethodOptions,
    Removed,
    Stack,
)
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, read_checkpoint
from stackctl.plan.build import plan_stack
from stackctl.plan.methods import SUM
from stackctl.plan.model import PlanMember, StackPlan
from stackctl.registry.checkpoint_copies import folder_digest
from stackctl.registry.entries import Entries
from stackctl.registry.summaries import AdapterRow, VersionRow
from stackctl.storage import files
from stackctl.storage.hash_cache import DigestCache

_DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}")


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


class Resolver(Entries):
    """Entries by what a person types."""

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
        if adapter:
            if reference.version is None:
                return ResolvedMember(adapter, adapter.newest(), 1.0)
            for version in adapter.versions:
                if version.version == reference.version:
                    return ResolvedMember(adapter, version, 1.0)
        if removed := self._removed(reference):
            raise NotFound(
                f"{reference} was removed; its weights are kept until: stackctl gc",
                hint=f"to have it again: stackctl add {reference.name} {self.weights_path(removed.version)}",
            )
        if not adapter:
            raise self._not_found(reference.name)
        have = ", ".join(str(v.version) for v in adapter.versions)
        raise NotFound(
            f"there is no {reference}; '{adapter.name}' has version {have}",
            hint=f"use {adapter.name}@{adapter.newest().version}",
        )

    def find_digest(self, digest: str) -> ResolvedMember | None:
        """The registered adapter version with that digest, under whatever name."""
        for row in self.adapter_rows():
            for version in row.versions:
                if version.digest == digest:
                    return self.resolve_adapter(Reference(row.name, version.version))
        return None

    def _by_digest(self, text: str) -> ResolvedMember:
        """A version by its digest or the beginning of it, also one that was removed, until ``gc``.

        Raises:
            NotFound, Usage: nothing has it, or several have.
        """
        removed = (self.find_removed(name) for name in self.names(Removed))
        owners: Iterable[AdapterRow | Removed] = itertools.chain(removed, self.adapter_rows())
        found = {
            v.digest: Reference(owner.name, v.version)
            for owner in owners
            for v in owner.versions
            if v.digest.startswith(text)
        }
        if not found:
            raise NotFound(f"nothing here has the digest {text}", hint="stackctl ls --json shows digests")
        if len(found) > 1:
            raise Usage(f"{len(found)} versions have a digest that begins with {text}", hint="write more of it")
        reference = found.popitem()[1]
        return self._removed(reference) or self.resolve_adapter(reference)

    def _removed(self, reference: Reference) -> ResolvedMember | None:
        """A version that was removed and whose weights are still there."""
        for version in self.find_removed(reference.name).versions:
            if version.version == reference.version:
                adapter = self.find_adapter(reference.name) or Adapter(name=reference.name, versions=[version])
                return ResolvedMember(adapter, version, 1.0)
        return None

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
        if base is not None and base != BASE and resolved.base.name != self.base(base).name:
            raise Incompatible(
                f"'{text}' has the base '{resolved.base.name}', not '{base}'",
                hint=f"leave out --base, or train on {base}",
            )
        return resolved

    def current(self) -> str:
        current = self.settings().current
        if current is None:
            raise Usage("no stack was named and there is no current one", hint="stackctl compose style+instruct")
        return current

    def _resolve(self, text: str, base: str | None, fresh: bool) -> ResolvedStack:
        if _DIGEST.fullmatch(text):
            member = self._by_digest(text)
            return ResolvedStack(member.label, self.base(member.version.base), (member,))
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
        members = self._members(terms)
        bases = {member.version.base for member in members}
        if len(bases) > 1:
            which = ", ".join(f"{m.label} on {m.version.base}" for m in members)
            raise Incompatible(f"the members have different bases: {which}", hint="use adapters of one base")
        return ResolvedStack(text, self.base(bases.pop()), members)

    def _members(self, terms: Sequence[Term]) -> tuple[ResolvedMember, ...]:
        """The members of all terms; everything that is wrong with any of them is told at once."""
        problems: list[StackctlError] = []
        members: list[ResolvedMember] = []
        for term in terms:
            with gathering(problems):
                members += self._expand(term)
        raise_all(problems)
        return tuple(members)

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
            reference = Reference(member.adapter, member.version)
            try:
                found = self.resolve_adapter(reference)
            except NotFound:
                if not (removed := self._removed(reference)):
                    raise
                found = removed
            if found.version.digest != member.digest:
                raise VerificationFailed(
                    f"{found.label} is not the one that the stack '{stack.name}' was composed of (digests differ)",
                    hint=f"stackctl compose {'+'.join(m.adapter for m in stack.members)} --name {stack.name}",
                )
            yield replace(found, weight=member.weight)

    # -- plans --------------------------------------------------------------------------------------------------

    def weights_path(self, version: AdapterVersion | VersionRow) -> Path:
        """Where a version's checkpoint lies, absolute."""
        return (self.root / version.path).resolve()

    def plan(self, stack: ResolvedStack) -> StackPlan:
        """The plan of a resolved stack, from its entries and its members' headers.

        Raises:
            NotFound, Incompatible, VerificationFailed: a checkpoint is missing, changed, or cannot be read.
        """
        try:
            members = [self._plan_member(member) for member in stack.members]
            plan = plan_stack(stack.base, members, stack.method, stack.options)
        except (NotFound, Incompatible, VerificationFailed):
            self.check_digests(stack.members)  # a file that was changed is the cause, whatever it led to
            raise
        if plan.errors:
            self.check_digests(stack.members)
        return plan

    def _plan_member(self, member: ResolvedMember) -> PlanMember:
        version = member.version
        return PlanMember(
            label=member.label, weight=member.weight, checkpoint=read_checkpoint(self.weights_path(version)),
            adapter=member.adapter.name, version=version.version, digest=version.digest, base=version.base,
            fingerprint=version.fingerprint, trained_on=tuple(version.trained_on),
        )  # fmt: skip

    def damaged(
        self, members: Iterable[ResolvedMember], *, fresh: bool = False, read: Callable[[int], None] = lambda _: None
    ) -> list[ResolvedMember]:
        """Those members whose files are missing or changed; ``fresh`` hashes even files that look unchanged.

        Args:
            read: is called with the bytes that were hashed freshly, piece by piece.
        """
        cache = DigestCache(self.root)
        sha256 = functools.partial(files.sha256_file, read=read) if fresh else cache.sha256
        found = [m for m in members if folder_digest(self.weights_path(m.version), sha256) != m.version.digest]
        cache.save()
        return found

    def check_digests(
        self, members: tuple[ResolvedMember, ...], *, fresh: bool = False, read: Callable[[int], None] = lambda _: None
    ) -> None:
        """Compare every member's checkpoint with what was registered; ``fresh`` and ``read`` as of :meth:`damaged`.

        Raises:
            VerificationFailed, NotFound: with the names of all that changed, and of all whose files are missing.
        """
        damaged = self.damaged(members, fresh=fresh, read=read)
        missing = [member.label for member in damaged if not self._has_files(member)]
        changed = [member.label for member in damaged if member.label not in missing]
        hint = f"stackctl verify --repair (or remove it: stackctl rm {(changed + missing + [''])[0]})"
        problems: list[StackctlError] = []
        if changed:
            what = f"the files of {', '.join(changed)} are not the ones that were registered (digests differ)"
            problems.append(VerificationFailed(what, hint=hint))
        if missing:
            problems.append(NotFound(f"the files of {', '.join(missing)} are missing", hint=hint))
        raise_all(problems)

    def _has_files(self, member: ResolvedMember) -> bool:
        return all((self.weights_path(member.version) / name).is_file() for name in (CONFIG, WEIGHTS))


def foundations(version: AdapterVersion | VersionRow) -> tuple[Term, ...]:
    """The terms that a version was trained on."""
    return parse_expression("+".join(version.trained_on)) if version.trained_on else ()


def _newer(members: tuple[ResolvedMember, ...]) -> Iterator[str]:
    for member in members:
        name, newest = member.adapter.name, member.adapter.newest().version
        if newest > member.version.version:
            yield f"{member.label} is used as composed; {name}@{newest} is newer (compose again to take it)"


def resolve_all(
    registry: Resolver, expressions: Sequence[str], base: str | None = None
) -> list[tuple[ResolvedStack, StackPlan]]:
    """Resolve and plan expressions that one loaded base shall serve; ``base`` among them means the others' base.

    Raises:
        StackctlError: everything that is wrong with them, at once.
    """
    problems: list[StackctlError] = []
    found: dict[int, tuple[ResolvedStack, StackPlan]] = {}

    def attempt(index: int, text: str, on: str | None) -> None:
        with gathering(problems):
            stack = registry.resolve(text, base=on)
            found[index] = (stack, registry.plan(stack).check())

    for index, text in enumerate(expressions):
        if text != BASE:
            attempt(index, text, base)
    common = base or next((stack.base.name for stack, _ in found.values()), None)
    for index, text in enumerate(expressions):
        if text == BASE:
            attempt(index, text, common)
    raise_all(problems)
    stacks = [found[index] for index in range(len(expressions))]
    if len({stack.base.name for stack, _ in stacks}) > 1:
        which = ", ".join(f"{stack.text} on {stack.base.name}" for stack, _ in stacks)
        raise Incompatible(f"they have different bases: {which}", hint="ask for stacks of one base at a time")
    return stacks
