"""Removing in two steps: ``rm`` takes a thing out of the registry, ``gc`` frees what no entry needs.

A removed version moves from ``adapters/NAME.yaml`` to ``removed/NAME.yaml`` and keeps its weights, so that a stack that
comes back by a merge still finds it by its digest. Its number stays given for ever.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import msgspec

from stackctl.core.errors import Usage, listed
from stackctl.core.expressions import BASE, Reference, parse_expression
from stackctl.core.schema import Adapter, AdapterVersion, GivenNumber, Removed, Stack
from stackctl.registry.adapters import foundations, resolve_adapter
from stackctl.registry.stacks import current_after, no_stack
from stackctl.registry.store import Registry
from stackctl.storage import files


@dataclass(frozen=True)
class Removal:
    """What ``rm`` took out, or would. ``bytes`` are those of its weights, which stay until ``gc``."""

    removed: tuple[str, ...]
    bytes: int


def remove_entry(registry: Registry, text: str, *, dry_run: bool = False) -> Removal:
    """Remove a stack, an adapter or one version of it.

    Raises:
        NotFound: it is not there.
        Usage: something stands on it.
    """
    with contextlib.nullcontext() if dry_run else registry.lock():
        if "@" not in text and text != BASE and (stack := registry.find_stack(text)):
            removal = Removal((stack.name,), 0)
            if not dry_run:
                current = registry.settings().current
                with current_after(registry, None if current == stack.name else current):
                    registry.delete(Stack, stack.name)
            return removal
        terms = parse_expression(text)
        if len(terms) > 1 and text == "+".join(term.reference.name for term in terms):
            raise no_stack(registry, text)
        if len(terms) != 1 or terms[0].weight != 1:
            raise Usage(f"'{text}' is not one adapter or stack", hint="name one: stackctl rm style@1")
        return _remove_versions(registry, terms[0].reference, dry_run)


def _remove_versions(registry: Registry, reference: Reference, dry_run: bool) -> Removal:
    if not registry.has(Adapter, reference.name) and registry.find_base(reference.name):
        raise Usage(f"'{reference.name}' is a base", hint=f"stackctl base rm {reference.name}")
    adapter = resolve_adapter(registry, reference).adapter
    labels = {label: v for label, v in adapter.labelled().items() if reference.version in (None, v.version)}
    going = list(labels.values())
    if users := _standing_on(registry, set(labels)):
        them = "it" if len(labels) == 1 else "them"
        raise Usage(
            f"{' and '.join(sorted(labels))} cannot be removed, for what depends on {them}: {listed(users, 20)}",
            hint=f"begin with what nothing depends on: stackctl rm {_free_user(registry, users)}",
        )
    own = [v for v in going if v.path == registry.relative_weights_path(adapter.name, v.version)]  # not those of a link
    size = sum(files.tree_bytes(registry.root / v.path) for v in own)
    removal = Removal(tuple(labels), size)
    if not dry_run:
        _move_out(registry, adapter, going)
    return removal


def _move_out(registry: Registry, adapter: Adapter, going: list[AdapterVersion]) -> None:
    """Into the removed ones first, then out of the entry: what a kill leaves in both is registered."""
    before = registry.find_removed(adapter.name)
    given = {g.version: g for g in before.given}
    given |= {v.version: GivenNumber(version=v.version, digest=v.digest) for v in adapter.versions}
    gone = {v.version: v for v in before.versions} | {v.version: v for v in going}
    removed = Removed(
        name=adapter.name,
        given=[given[number] for number in sorted(given)],
        versions=[gone[number] for number in sorted(gone)],
    )
    staying = [v for v in adapter.versions if v not in going]
    if staying:
        registry.write(removed, msgspec.structs.replace(adapter, versions=staying))
    else:
        registry.write(removed)
        registry.delete(Adapter, adapter.name)


def _standing_on(registry: Registry, labels: set[str]) -> list[str]:
    """What stands on versions of one adapter: other versions, and stacks."""
    (name,) = {label.partition("@")[0] for label in labels}
    users = [
        label
        for adapter in registry.adapters(mentioning=name)
        for label, version in adapter.labelled().items()
        if label not in labels and any(str(term.reference) in labels for term in foundations(version))
    ]
    stacks = registry.stacks(mentioning=name)
    return [*users, *(stack.name for stack in stacks if any(member.label in labels for member in stack.members))]


def _free_user(registry: Registry, users: list[str]) -> str:
    """One of them that can be removed at once: stacks can."""
    return next((user for user in reversed(users) if "@" not in user or not _standing_on(registry, {user})), users[-1])
