"""The grammar of names, references and expressions.

    name        [a-z0-9][a-z0-9._-]{0,63}
    reference   name | name@2
    term        reference | reference:0.7
    expression  term (+ term)* | base

Everything here is text to value and back: no registry, no disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from stackctl.core.errors import Usage
from stackctl.core.fields import HUGE

BASE = "base"
"""The expression that means: the base model alone."""

_NAME = r"[a-z0-9][a-z0-9._-]{0,63}"
NUMBER = r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
"""A finite number, in an expression and in YAML alike."""
_NAME_RE = re.compile(_NAME)
_TERM_RE = re.compile(rf"(?P<name>{_NAME})(?:@(?P<version>[0-9]+))?(?::(?P<weight>{NUMBER}))?")
_STACK_NAME_RE = re.compile(rf"{_NAME}(?:\+{_NAME})*")
_MAX_STACK_NAME = 240  # it is the name of a file, with an extension, and file systems hold 255 bytes
_QUOTED = 120
_GRAMMAR = "an expression is name[@version][:weight] joined by '+', for example style:0.7+instruct@2"


@dataclass(frozen=True, slots=True)
class Reference:
    """A name with or without a version; without one it means the newest."""

    name: str
    version: int | None = None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class Term:
    """One member of an expression with its weight."""

    reference: Reference
    weight: float = 1.0

    def __str__(self) -> str:
        return format_term(str(self.reference), self.weight)


def parse_name(text: str, what: str = "name") -> str:
    """Check a name that somebody wants to give to something.

    Raises:
        Usage: the text is not a name, or is reserved.
    """
    if not _NAME_RE.fullmatch(text):
        raise Usage(
            f"'{cut(text)}' is not a valid {what}",
            hint="a name is 1 to 64 of a-z, 0-9, '.', '_', '-' and begins with a letter or a digit",
        )
    if text == BASE:
        raise Usage(f"'{BASE}' is reserved: it means the base model alone", hint="choose another name")
    return text


def cut(text: str) -> str:
    """What somebody typed, short enough to be quoted in an error."""
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 20]}…{text[-19:]}"


def parse_stack_name(text: str, own: str | None = None) -> str:
    """Check the name of a stack: a name, or names joined by '+', which is what a stack without a name is called.

    ``own`` is what that stack is called without a name, where it is known: the one name with a '+' that it may have.
    """
    if "+" not in text:
        return parse_name(text, "stack name")
    if not _STACK_NAME_RE.fullmatch(text) or BASE in text.split("+"):
        raise Usage(f"'{cut(text)}' is not a valid stack name", hint="use a plain name, or names joined by '+'")
    if len(text) > _MAX_STACK_NAME:
        raise Usage(f"'{cut(text)}' is too long for the name of a stack", hint="give it a shorter one with --name")
    if own is not None and text != own:
        raise Usage(
            f"'{text}' reads as an expression, and not as the one it would name",
            hint=f"use a name without '+'; without a name of its own it is called {own}",
        )
    return text


def parse_reference(text: str) -> Reference:
    """``style`` or ``style@2``.

    Raises:
        Usage: anything else.
    """
    match = _TERM_RE.fullmatch(text)
    if not match or match["weight"] is not None:
        raise Usage(f"'{cut(text)}' is not a reference", hint="write name or name@version, for example style@2")
    return Reference(match["name"], _parse_version(match["version"], text))


def parse_expression(text: str) -> tuple[Term, ...]:
    """Parse an expression into its terms; the empty tuple is the base alone.

    ``+`` joins terms and is also a character of ``1e+5``, so this reads term by term, longest match first.

    Raises:
        Usage: the text is no expression, a weight is not finite, ``base`` stands among other terms.
    """
    if text == BASE:
        return ()
    terms: list[Term] = []
    position = 0
    while True:
        match = _TERM_RE.match(text, position)
        if not match:
            raise Usage(f"'{cut(text)}' is not an expression{_where(text, position)}", hint=_GRAMMAR)
        end = match.end()
        if end < len(text) and text[end] != "+":
            raise Usage(f"'{cut(text)}' is not an expression{_where(text, end)}", hint=_GRAMMAR)
        terms.append(_term(match, text))
        if end == len(text):
            break
        position = end + 1
    if any(term.reference.name == BASE for term in terms):
        raise Usage(
            f"'{BASE}' is the base alone and cannot be a term of '{cut(text)}'",
            hint=f"leave it out: {format_expression(t for t in terms if t.reference.name != BASE) or BASE}",
        )
    return tuple(terms)


def _term(match: re.Match[str], text: str) -> Term:
    weight = float(match["weight"]) if match["weight"] is not None else 1.0
    if not abs(weight) <= HUGE:
        what = "too large" if math.isfinite(weight) else "not a finite number"
        raise Usage(f"the weight of '{match['name']}' in '{cut(text)}' is {what}", hint=_GRAMMAR)
    return Term(Reference(match["name"], _parse_version(match["version"], text)), weight)


def _parse_version(digits: str | None, text: str) -> int | None:
    if digits is None:
        return None
    if len(digits) > 9 or int(digits) < 1:
        raise Usage(f"'{cut(text)}' has no valid version", hint="versions count from 1, for example style@2")
    return int(digits)


def _where(text: str, position: int) -> str:
    if not text:
        return " (it is empty)"
    if position >= len(text):
        return " (it ends too early)"
    return f" (at '{text[position:][:20]}')"


def format_weight(weight: float) -> str:
    """The shortest text that reads back as the same number: ``1``, ``0.7``, ``-2``."""
    return str(int(weight)) if weight == int(weight) and abs(weight) < 1e15 else repr(weight)


def format_term(reference: str, weight: float) -> str:
    """``style@1`` or ``style@1:0.7``; a weight of one is not written."""
    return reference if weight == 1 else f"{reference}:{format_weight(weight)}"


def format_sum(terms: Iterable[tuple[str, float]], method: str | None = None) -> str:
    """What a stack of (name, weight) computes: ``W = W_base + 0.7·ΔW_style - ΔW_tone``.

    With a ``method`` other than the sum: ``W = W_base + ties(0.7·ΔW_style - ΔW_tone)``.
    """
    total = ""
    for name, weight in terms:
        factor = "" if abs(weight) == 1 else f"{format_weight(abs(weight))}·"
        total += f" {'-' if weight < 0 else '+'} {factor}ΔW_{name}"
    if method:
        total = f" + {method}({total.removeprefix(' + ').strip()})"
    return f"W = W_base{total}"


def format_expression(terms: Iterable[object]) -> str:
    """Terms (anything that prints as a term) joined by ``+``; ``base`` when there are none."""
    return "+".join(str(term) for term in terms) or BASE
