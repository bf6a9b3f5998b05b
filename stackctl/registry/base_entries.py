"""Entries of base models: finding, writing and removing them, never their files."""

from __future__ import annotations

import msgspec

from stackctl.core.errors import Incompatible, NotFound, Usage, did_you_mean, listed
from stackctl.core.expressions import BASE, parse_name
from stackctl.core.schema import Base, Defaults, Stack
from stackctl.registry.store import Registry


def resolve_base(registry: Registry, name: str | None = None) -> Base:
    """A base by name; without a name the default one, or the only one there is.

    Raises:
        NotFound, Usage: it is not there, or several are and none is the default.
    """
    if name is not None and name != BASE:
        found = registry.find_base(name)
        if not found:
            raise NotFound(
                f"there is no base '{name}'",
                hint=did_you_mean(name, registry.names(Base), f"register it: stackctl base add {name} SOURCE"),
            )
        return found
    default = registry.settings().defaults.base
    names = registry.names(Base)
    if default and default in names:
        return resolve_base(registry, default)
    if len(names) == 1:
        return resolve_base(registry, names[0])
    if not names:
        raise NotFound("no base is registered", hint="stackctl base add smollm2")
    raise Usage(f"there are several bases: {', '.join(names)}", hint=f"say which one: --base {names[0]}")


def resolve_stack_base(registry: Registry, stack: Stack) -> Base:
    """The base of a stored stack.

    Raises:
        NotFound, Incompatible: it is not there, or another model has its name by now.
    """
    base = resolve_base(registry, stack.base)
    if base.fingerprint != stack.fingerprint:
        raise Incompatible(
            f"the stack '{stack.name}' was composed on another model than the base '{base.name}' now is",
            hint="register that model under its own name, and compose again",
        )
    return base


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
        settings = registry.settings()
        if settings.defaults.base is None:
            settings = msgspec.structs.replace(settings, defaults=Defaults(base=base.name))
        with registry.settings_after(settings):
            registry.write(base)


def remove_base(registry: Registry, name: str) -> None:
    """Remove a base's entry (never its files).

    Raises:
        NotFound, Usage: it is not there, or adapters stand on it.
    """
    with registry.lock():
        resolve_base(registry, name)
        adapters = registry.adapters(mentioning=name)
        users = [label for adapter in adapters for label, v in adapter.labelled().items() if v.base == name]
        users += [stack.name for stack in registry.stacks(mentioning=name) if stack.base == name and not stack.members]
        if users:
            raise Usage(
                f"the base '{name}' cannot be removed, for what depends on it: {listed(users, 20)}",
                hint=f"remove them first: stackctl rm {users[0].partition('@')[0]}",
            )
        settings = registry.settings()
        if settings.defaults.base == name:
            settings = msgspec.structs.replace(settings, defaults=Defaults())
        with registry.settings_after(settings):
            registry.delete(Base, name)
