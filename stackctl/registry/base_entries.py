"""Entries of base models: writing and removing them, never their files."""

from __future__ import annotations

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.expressions import parse_name
from stackctl.core.schema import Base, Defaults
from stackctl.registry.resolve import resolve_base
from stackctl.registry.store import Registry


def save_base(registry: Registry, base: Base) -> None:
    """Write a base's entry; the first one becomes the default.

    Raises:
        Usage: another model has that name.
    """
    parse_name(base.name, "base name")
    with registry.lock():
        known = registry.find_base(base.name)
        if known and known.fingerprint != base.fingerprint:
            raise Usage(
                f"the base '{base.name}' is another model ({known.source})",
                hint=f"choose another name, or: stackctl base rm {base.name}",
            )
        registry.write(base)
        settings = registry.settings()
        if settings.defaults.base is None:
            registry.write_settings(msgspec.structs.replace(settings, defaults=Defaults(base=base.name)))


def remove_base(registry: Registry, name: str) -> None:
    """Remove a base's entry (never its files).

    Raises:
        NotFound, Usage: it is not there, or adapters stand on it.
    """
    with registry.lock():
        resolve_base(registry, name)
        users = [
            f"{a.name}@{v.version}" for a in registry.adapters(mentioning=name) for v in a.versions if v.base == name
        ]
        users += [stack.name for stack in registry.stacks(mentioning=name) if stack.base == name and not stack.members]
        if users:
            raise Usage(
                f"the base '{name}' cannot be removed: {', '.join(users)} depend on it",
                hint=f"remove them first: stackctl rm {users[0].partition('@')[0]}",
            )
        registry.delete(Base, name)
        settings = registry.settings()
        if settings.defaults.base == name:
            registry.write_settings(msgspec.structs.replace(settings, defaults=Defaults()))
