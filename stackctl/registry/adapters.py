"""One version of an adapter, found by its name, its number or its digest. Reads entries, changes nothing."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import msgspec

from stackctl.core.errors import NotFound, StackctlError, Usage, did_you_mean
from stackctl.core.expressions import Reference, Term, format_term, parse_expression
from stackctl.core.schema import Adapter, AdapterVersion, Base, Member, Removed, Stack
from stackctl.registry.store import Registry

DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}")


@dataclass(frozen=True)
class ResolvedMember:
    """One adapter version of an expression, with its weight, and of a stored stack others by layer or module."""

    adapter: Adapter
    version: AdapterVersion
    weight: float
    layer_weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return str(self.reference)

    @property
    def reference(self) -> Reference:
        return Reference(self.adapter.name, self.version.version)

    def __str__(self) -> str:
        return format_term(self.label, self.weight)

    @property
    def is_plain(self) -> bool:
        """Whether it is the adapter as it was trained, with the weight one everywhere."""
        return self.weight == 1 and not self.layer_weights

    def times(self, weight: float) -> ResolvedMember:
        """This member in a stack that has a weight itself."""
        by_name = {name: value * weight for name, value in self.layer_weights.items()}
        return replace(self, weight=self.weight * weight, layer_weights=by_name)

    def entry(self) -> Member:
        """How the entry of a stack pins it."""
        return Member(
            adapter=self.adapter.name, version=self.version.version, digest=self.version.digest, weight=self.weight,
            layer_weights=dict(self.layer_weights),
        )  # fmt: skip


def resolve_adapter(registry: Registry, reference: Reference) -> ResolvedMember:
    """An adapter version; without a version the newest.

    Raises:
        NotFound: no such adapter, or not in that version.
    """
    adapter = registry.find_adapter(reference.name)
    if adapter:
        found = adapter.newest() if reference.version is None else adapter.numbered(reference.version)
        if found:
            return ResolvedMember(adapter, found, 1.0)
    if removed := find_removed_version(registry, reference):
        kept = shlex.quote(str(registry.weights_path(removed.version)))
        raise NotFound(
            f"{reference} was removed; its weights are kept until: stackctl gc",
            hint=f"to have it again: stackctl add {reference.name} {kept}",
        )
    if not adapter:
        raise _not_found(registry, reference)
    have = f"version{'s' if len(adapter.versions) > 1 else ''} {', '.join(str(v.version) for v in adapter.versions)}"
    hint = f"use {adapter.name}@{adapter.newest().version}"
    raise NotFound(f"there is no {reference}; '{adapter.name}' has {have}", hint=hint)


def find_digest(registry: Registry, digest: str) -> ResolvedMember | None:
    """The registered adapter version with that digest, under whatever name."""
    for adapter in registry.adapters(mentioning=digest):
        for version in adapter.versions:
            if version.digest == digest:
                return ResolvedMember(adapter, version, 1.0)
    return None


def find_removed_version(registry: Registry, reference: Reference) -> ResolvedMember | None:
    """A version that was removed and whose weights are still there."""
    version = registry.find_removed(reference.name).numbered(reference.version)
    if version is None:
        return None
    adapter = registry.find_adapter(reference.name) or Adapter(name=reference.name, versions=[version])
    return ResolvedMember(adapter, version, 1.0)


def resolve_kept(registry: Registry, reference: Reference) -> ResolvedMember:
    """An adapter version, one that was removed too as long as its weights are there.

    Raises:
        NotFound: it is gone.
    """
    try:
        return resolve_adapter(registry, reference)
    except NotFound:
        if removed := find_removed_version(registry, reference):
            return removed
        raise


def with_versions(adapter: Adapter, *changed: AdapterVersion) -> Adapter:
    """An adapter's entry with some versions more, or in the place of those that have their numbers."""
    versions = {version.version: version for version in (*adapter.versions, *changed)}
    return msgspec.structs.replace(adapter, versions=[versions[number] for number in sorted(versions)])


def foundations(version: AdapterVersion) -> tuple[Term, ...]:
    """The terms that a version was trained on."""
    return parse_expression("+".join(version.trained_on)) if version.trained_on else ()


def registered_versions(registry: Registry) -> Iterator[AdapterVersion]:
    """Every registered version; an entry that cannot be read is passed over."""
    for name in registry.names(Adapter):
        with contextlib.suppress(StackctlError):
            adapter = registry.find_adapter(name)
            yield from adapter.versions if adapter else ()


def resolve_digest(registry: Registry, text: str) -> ResolvedMember:
    """A version by its digest or the beginning of it, also one that was removed, until ``gc``.

    Raises:
        NotFound, Usage: nothing has it, or several have.
    """
    removed = (registry.find_removed(name) for name in registry.names(Removed))
    owners: Iterator[Adapter | Removed] = itertools.chain(removed, registry.adapters(mentioning=text))
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
    return find_removed_version(registry, reference) or resolve_adapter(registry, reference)


def _not_found(registry: Registry, reference: Reference) -> StackctlError:
    name = reference.name
    if registry.find_base(name):
        return NotFound(f"'{name}' is a base, and no adapter or stack", hint="leave it out: adapters know their base")
    if registry.find_stack(name):
        if reference.version is not None:
            return Usage(f"'{reference}': a stack has no versions", hint=f"write {name}")
        return NotFound(f"'{name}' is a stack, and no adapter", hint=f"name one of: stackctl inspect {name}")
    known = [*registry.names(Adapter), *registry.names(Stack), *registry.names(Base)]
    hint = did_you_mean(name, known, "stackctl ls shows what there is")
    return NotFound(f"there is no adapter, stack or base '{name}'", hint=hint)
