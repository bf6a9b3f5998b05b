"""Expressions and stored stacks to pinned members on a base. Reads entries, changes nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from stackctl.core.errors import Incompatible, Usage, VerificationFailed, attempt_each
from stackctl.core.expressions import BASE, Reference, Term, parse_expression, parse_stack_name
from stackctl.core.fields import HUGE
from stackctl.core.schema import Adapter, Base, MethodOptions, Stack
from stackctl.plan.methods import SUM, compose_command
from stackctl.registry.adapters import DIGEST, ResolvedMember, resolve_adapter, resolve_digest, resolve_kept
from stackctl.registry.base_entries import resolve_base, resolve_stack_base
from stackctl.registry.store import Registry


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
    def expression(self) -> str:
        """What means this stack again: its members pinned, or as it was typed where an expression cannot say it all."""
        return self.text if any(member.layer_weights for member in self.members) else self.pinned

    @property
    def typed(self) -> str | None:
        """The expression that is this stack and no other, pinned; None where none can say it: layers, a method."""
        layered = any(member.layer_weights for member in self.members)
        return None if layered or self.method != SUM else self.pinned

    def terms(self) -> list[str]:
        """Its members as terms, pinned, which is how an adapter says what it was trained on.

        Raises:
            Incompatible: terms cannot say it: a member has weights by layer.
        """
        if layered := [member.label for member in self.members if member.layer_weights]:
            raise Incompatible(
                f"{', '.join(layered)} {'has' if len(layered) == 1 else 'have'} weights by layer in '{self.text}', "
                "which nothing can be trained on as it is",
                hint=one_adapter(self.text),
            )
        return [str(member) for member in self.members]

    def entry(self, name: str, created: str) -> Stack:
        """The entry that it is stored by under a name."""
        return Stack(
            name=name, base=self.base.name, fingerprint=self.base.fingerprint, method=self.method, options=self.options,
            members=[member.entry() for member in self.members], created=created,
        )  # fmt: skip

    @property
    def default_name(self) -> str:
        """The expression's names joined by '+', which is what an unnamed stack is called."""
        return "+".join(member.adapter.name for member in self.members) or BASE


def one_adapter(text: str) -> str:
    """How a stack that is more than weights becomes something that can be a term."""
    return f"make it one adapter: stackctl export {text} --format peft --out DIR, then stackctl add NAME DIR"


def resolve_expression(
    registry: Registry, text: str | None = None, *, base: str | None = None, fresh: bool = False
) -> ResolvedStack:
    """Find and pin everything that an expression names; None means the current stack.

    ``style+instruct`` that is also a stored stack's name means that stack, as pinned; with ``fresh`` it is read as
    an expression all the same, which is how one composes it again.

    Raises:
        NotFound, Usage, Incompatible: a name is missing, the text is no expression, the bases differ.
    """
    if text is None:
        text = current_stack(registry)
    resolved = _resolve(registry, text, base, fresh)
    if base is not None and base != BASE and resolved.base.name != resolve_base(registry, base).name:
        raise Incompatible(
            f"'{text}' has the base '{resolved.base.name}', not '{base}'", hint=f"leave out --base, or train on {base}"
        )
    return resolved


def current_stack(registry: Registry) -> str:
    """The name of the stack that is meant when none is named.

    Raises:
        Usage: there is none.
    """
    current = registry.settings().current
    if current is None:
        raise Usage("no stack was named and there is no current one", hint="stackctl compose style+instruct")
    return current


def pinned_members(registry: Registry, stack: Stack) -> Iterator[ResolvedMember]:
    """The members of a stored stack, removed ones too as long as their weights are there.

    Raises:
        NotFound, VerificationFailed: one of them is gone, or is not what the stack was composed of.
    """
    for member in stack.members:
        found = resolve_kept(registry, Reference(member.adapter, member.version))
        if found.version.digest != member.digest:
            raise VerificationFailed(
                f"{found.label} is not the one that the stack '{stack.name}' was composed of (digests differ)",
                hint=compose_command(stack, stack.name) or "learn its weights again: stackctl compose EXPR --fit FILE",
            )
        yield replace(found, weight=member.weight, layer_weights=member.layer_weights)


def _resolve(registry: Registry, text: str, base: str | None, fresh: bool) -> ResolvedStack:
    if DIGEST.fullmatch(text):
        member = resolve_digest(registry, text)
        return ResolvedStack(member.label, resolve_base(registry, member.version.base), (member,))
    terms = parse_expression(text)
    if not (fresh and "+" in text) and (stored := _stored(registry, text)):
        members = tuple(pinned_members(registry, stored))
        notes, base_entry = tuple(_newer(members)), resolve_stack_base(registry, stored)
        return ResolvedStack(text, base_entry, members, stored.name, notes, stored.method, stored.options)
    if not terms:
        return ResolvedStack(text, resolve_base(registry, base), ())
    only = terms[0].reference
    is_name = len(terms) == 1 and only.version is None and terms[0].weight == 1
    is_taken = registry.has(Adapter, only.name) or registry.has(Stack, only.name)
    if is_name and not is_taken and (named := registry.find_base(only.name)):
        return ResolvedStack(text, named, ())
    members = tuple(itertools.chain(*attempt_each(functools.partial(_expand, registry), terms)))
    bases = {member.version.base for member in members}
    if len(bases) > 1:
        which = ", ".join(f"{m.label} on {m.version.base}" for m in members)
        raise Incompatible(f"the members have different bases: {which}", hint="use adapters of one base")
    return ResolvedStack(text, resolve_base(registry, bases.pop()), members)


def _expand(registry: Registry, term: Term) -> list[ResolvedMember]:
    """A term's members: the adapter, or a named stack's members with their weights multiplied."""
    name = term.reference.name
    if not registry.has(Adapter, name) and (stack := registry.find_stack(name)):
        if term.reference.version is not None:
            raise Usage(f"'{term.reference}': a stack has no versions", hint=f"write {name}")
        if stack.method != SUM:
            raise Incompatible(
                f"the stack '{name}' is composed by {stack.method} and cannot be a term of a sum",
                hint=one_adapter(name),
            )
        members = [m.times(term.weight) for m in pinned_members(registry, stack)]
        if not all(abs(w) <= HUGE for m in members for w in (m.weight, *m.layer_weights.values())):
            raise Usage(f"the weights of '{term}' are too large, or not finite numbers", hint="use a smaller weight")
        return members
    return [replace(resolve_adapter(registry, term.reference), weight=term.weight)]


def _stored(registry: Registry, text: str) -> Stack | None:
    """The stored stack that an expression is the name of."""
    try:
        parse_stack_name(text)
    except Usage:
        return None
    return registry.find_stack(text)


def _newer(members: tuple[ResolvedMember, ...]) -> Iterator[str]:
    for member in members:
        name, newest = member.adapter.name, member.adapter.newest().version
        if newest > member.version.version:
            yield f"{member.label} is used as composed; {name}@{newest} is newer (compose again to take it)"
