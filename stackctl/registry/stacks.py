"""Stacks: writing their entries, and which of them is the current one."""

from __future__ import annotations

import contextlib

import msgspec

from stackctl.core.errors import NotFound, Usage, did_you_mean
from stackctl.core.expressions import parse_stack_name
from stackctl.core.schema import Adapter, Stack
from stackctl.registry.adapters import resolve_adapter
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry, now


def check_stack_name(registry: Registry, name: str, stack: ResolvedStack) -> None:
    """Make sure that a stack may have a name.

    Raises:
        Usage: the name is an adapter's, or another expression's.
    """
    parse_stack_name(name, stack.default_name)
    _check_not_adapter(registry, name)


def _check_not_adapter(registry: Registry, name: str) -> None:
    if "+" not in name and registry.has(Adapter, name):
        raise Usage(f"'{name}' is the name of an adapter", hint="choose another name with --name")


def save_stack(registry: Registry, name: str, stack: ResolvedStack) -> Stack:
    """Write a stack's entry and make it the current one.

    Raises:
        Usage: the name is an adapter's, or another expression's.
    """
    with registry.lock():
        check_stack_name(registry, name, stack)
        for member in stack.members:  # under the lock, so that none is removed meanwhile
            resolve_adapter(registry, member.reference)
        entry, known = stack.entry(name, now()), registry.find_stack(name)
        if known and msgspec.structs.replace(known, created=entry.created) == entry:
            entry = known
        with current_after(registry, name):
            if entry is not known:
                registry.write(entry)
    return entry


def put_stack(registry: Registry, stack: Stack) -> Stack | None:
    """Write the entry of a stack that was composed elsewhere; the current stack stays. Returns what it replaced.

    Raises:
        Usage: the name is an adapter's.
    """
    parse_stack_name(stack.name)
    with registry.lock():
        _check_not_adapter(registry, stack.name)
        known = registry.find_stack(stack.name)
        if known != stack:
            registry.write(stack)
    return known


def use_stack(registry: Registry, name: str) -> Stack:
    """Make a stored stack the current one.

    Raises:
        NotFound: there is no stack of that name.
        Usage: nothing can have that name.
    """
    with registry.lock():
        stack = registry.find_stack(name)
        if not stack:
            if "+" not in name and registry.find_adapter(name):
                raise NotFound(f"'{name}' is an adapter, and no stack", hint=f"stackctl compose {name} --name NAME")
            raise no_stack(registry, name, *([f"make it: stackctl compose {name}"] if "+" in name else []))
        with current_after(registry, name):
            pass
    return stack


def no_stack(registry: Registry, name: str, else_: str = "stackctl ls shows what there is") -> NotFound:
    """The error that there is no stack of a name; ``else_`` is the hint where none is called like it."""
    near = did_you_mean(name, registry.names(Stack), else_)
    return NotFound(f"there is no stack '{name}'", hint=near)


def current_after(registry: Registry, name: str | None) -> contextlib.AbstractContextManager[None]:
    """Around what writes or removes a stack: afterwards the current one is this."""
    return registry.settings_after(msgspec.structs.replace(registry.settings(), current=name))
