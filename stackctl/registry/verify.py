"""Everything registered, hashed and compared with what its entries say."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from stackctl.core import Say
from stackctl.core.errors import Incompatible, NotFound, StackctlError, explain_oserror
from stackctl.core.schema import Adapter, AdapterInfo, Base, Removed, Stack
from stackctl.lora.checkpoint import read_info
from stackctl.registry.adapters import ResolvedMember, foundations, registered_versions, resolve_adapter
from stackctl.registry.base_entries import resolve_base, resolve_stack_base
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import plan_member
from stackctl.registry.resolve import pinned_members
from stackctl.registry.store import Registry

_REMEMBERED = 1000
"""Entries that others stand on, kept while everything is checked."""


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
    checked = _read_entries(registry, problems) if only is None else 0
    below = _Foundations(registry)
    names = None if only is None else {label.partition("@")[0] for label in only}
    for name in registry.names(Adapter):
        adapter = None
        if names is None or name in names:
            with _noting(problems, name):
                adapter = registry.read(Adapter, name)
        for member in [ResolvedMember(adapter, version, 1.0) for version in adapter.versions] if adapter else []:
            if only is None or member.label in only:
                progress(member.label)
                checked += 1
                with _noting(problems, member.label):
                    try:
                        check_digests(registry, (member,), fresh=True, read=read)
                    except (StackctlError, OSError):
                        damaged(member)
                        raise
                    below.check(member)
    return checked, problems


def _read_entries(registry: Registry, problems: list[dict[str, Any]]) -> int:
    """Read everything but adapters, and count the bases and stacks."""
    with _noting(problems, "registry"):
        registry.settings()
    for name in registry.names(Removed):
        with _noting(problems, name):
            registry.find_removed(name)
    bases, stacks = registry.names(Base), registry.names(Stack)
    for name in bases:
        with _noting(problems, name):
            registry.read(Base, name)
    for name in stacks:
        with _noting(problems, name):
            if stack := registry.read(Stack, name):
                list(pinned_members(registry, stack))
                resolve_stack_base(registry, stack)
    return len(bases) + len(stacks)


@contextlib.contextmanager
def _noting(problems: list[dict[str, Any]], what: str) -> Iterator[None]:
    """Put what goes wrong with a thing among the problems; a disk that fails in one place may be whole in others."""
    try:
        yield
    except StackctlError as error:
        problems.append({"what": what, "message": error.message})
    except OSError as error:
        problems.append({"what": what, "message": explain_oserror(error).message})


def bytes_to_verify(registry: Registry) -> int:
    """How much there is to hash, as the entries say that can be read."""
    return sum(version.bytes for version in registered_versions(registry))


class _Foundations:
    """What versions stand on. Entries are kept while everything is checked: many stand on the same few."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._base = functools.lru_cache(_REMEMBERED)(functools.partial(resolve_base, registry))
        self._version = functools.lru_cache(_REMEMBERED)(functools.partial(resolve_adapter, registry))

    def check(self, member: ResolvedMember) -> None:
        """A version's header can be read, and its base and what it was trained on are what they were.

        Raises:
            StackctlError: they are not.
        """
        plan_member(self._registry, member)
        base = self._base(member.version.base)
        if base.fingerprint != member.version.fingerprint:
            raise Incompatible(f"{member.label} was trained on another model than the base '{base.name}' now is")
        below = [self._version(term.reference) for term in foundations(member.version)]
        self._check_order(member, below)
        _check_foundations(member, below, read_info(self._registry.weights_path(member.version)))

    def _check_order(self, member: ResolvedMember, below: list[ResolvedMember]) -> None:
        """A version stands on what was there before it: never, by way of whatever others, on itself."""
        seen, left = set[str](), list(below)
        while left:
            under = left.pop()
            if under.label == member.label:
                raise Incompatible(f"{member.label} is said to be trained on itself, by way of its own foundations")
            if under.label not in seen:
                seen.add(under.label)
                with contextlib.suppress(NotFound):  # told of the version that stands on it
                    left += [self._version(term.reference) for term in foundations(under.version)]


def _check_foundations(member: ResolvedMember, below: list[ResolvedMember], info: AdapterInfo | None) -> None:
    """What a version was trained on is what now has that number: a merge may have given it to something else.

    Raises:
        Incompatible: it is not. Only what training said of itself is compared; who adds a checkpoint says on what.
    """
    if member.version.run is None or info is None or f"{info.adapter}@{info.version}" != member.label:
        return
    trained_on = {one.label: one.digest for one in info.trained_on}
    for found in below:
        if trained_on.get(found.label, found.version.digest) != found.version.digest:
            raise Incompatible(f"{member.label} was trained on another {found.label} than the one that is here now")
