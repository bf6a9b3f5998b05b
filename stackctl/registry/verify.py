"""Everything registered, hashed and compared with what its entries say."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from stackctl.core import Say
from stackctl.core.errors import Incompatible, StackctlError, explain_oserror
from stackctl.core.expressions import Reference
from stackctl.core.schema import Adapter, AdapterInfo, Base, Removed, Stack
from stackctl.lora.checkpoint import read_info
from stackctl.registry.adapters import ResolvedMember, foundations, registered_versions, resolve_adapter
from stackctl.registry.base_entries import resolve_base, resolve_stack_base
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import plan_member
from stackctl.registry.resolve import pinned_members
from stackctl.registry.store import Registry

_REMEMBERED = 1000
"""Entries that others stand on, kept while everything is checked: many stand on the same few."""


def verify_registry(
    registry: Registry,
    only: set[str] | None = None,
    progress: Say = lambda _: None,
    damaged: Callable[[ResolvedMember], None] = lambda _: None,
    read: Callable[[int], None] = lambda _: None,
) -> tuple[int, list[dict[str, Any]]]:
    """Rehash everything registered, or only the labels given.

    Args:
        progress: is called with the label of each version before it is hashed.
        damaged: is called with each version whose files are missing or changed.
        read: is called with the bytes that were hashed, piece by piece; :func:`bytes_to_verify` is about their sum.

    Returns:
        how many things were checked, and every problem found as ``{"what", "message"}``.
    """
    problems: list[dict[str, Any]] = []
    checked = 0
    base = functools.lru_cache(_REMEMBERED)(functools.partial(resolve_base, registry))
    foundation = functools.lru_cache(_REMEMBERED)(functools.partial(resolve_adapter, registry))

    def attempt(what: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except StackctlError as error:
            problems.append({"what": what, "message": error.message})
        except OSError as error:  # a disk that fails in one place may be whole in others
            problems.append({"what": what, "message": explain_oserror(error).message})
        return None

    if only is None:
        attempt("registry", registry.settings)
        for name in registry.names(Removed):
            attempt(name, lambda n=name: registry.find_removed(n))  # type: ignore[misc]
        for kind in (Base, Stack):
            for name in registry.names(kind):
                checked += 1
                entry = attempt(name, lambda k=kind, n=name: registry.read(k, n))  # type: ignore[misc]
                if isinstance(entry, Stack):
                    attempt(name, lambda e=entry: (list(pinned_members(registry, e)), resolve_stack_base(registry, e)))  # type: ignore[misc]
    for name in registry.names(Adapter):
        if only is not None and not any(label.partition("@")[0] == name for label in only):
            continue
        adapter = attempt(name, lambda n=name: registry.read(Adapter, n))  # type: ignore[misc]
        for version in adapter.versions if adapter else ():
            label = f"{name}@{version.version}"
            if only is None or label in only:
                progress(label)
                checked += 1
                member = ResolvedMember(adapter, version, 1.0)
                attempt(label, lambda m=member: _verify_version(registry, m, damaged, read, base, foundation))  # type: ignore[misc]
    return checked, problems


def bytes_to_verify(registry: Registry) -> int:
    """How much there is to hash, as the entries say that can be read."""
    return sum(version.bytes for version in registered_versions(registry))


def _verify_version(
    registry: Registry,
    member: ResolvedMember,
    damaged: Callable[[ResolvedMember], None],
    read: Callable[[int], None],
    find_base: Callable[[str], Base],
    find_foundation: Callable[[Reference], ResolvedMember],
) -> None:
    try:
        check_digests(registry, (member,), fresh=True, read=read)
    except (StackctlError, OSError):
        damaged(member)
        raise
    plan_member(registry, member)
    base = find_base(member.version.base)
    if base.fingerprint != member.version.fingerprint:
        raise Incompatible(f"{member.label} was trained on another model than the base '{base.name}' now is")
    below = [find_foundation(term.reference) for term in foundations(member.version)]
    _check_foundations(member, below, read_info(registry.weights_path(member.version)))


def _check_foundations(member: ResolvedMember, below: list[ResolvedMember], info: AdapterInfo | None) -> None:
    """What a version was trained on is what now has that number: a merge may have given it to something else.

    Raises:
        Incompatible: it is not. Only what training said of itself is compared; who adds a checkpoint says on what.
    """
    if member.version.run is None or info is None or f"{info.adapter}@{info.version}" != member.label:
        return
    trained_on = {f"{one.adapter}@{one.version}": one.digest for one in info.trained_on}
    for found in below:
        if trained_on.get(found.label, found.version.digest) != found.version.digest:
            raise Incompatible(f"{member.label} was trained on another {found.label} than the one that is here now")
