"""Texts and values that a careless reader or writer of YAML would spoil."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

NASTY = [
    "", " ", "  x", "x  ", "on", "no", "yes", "null", "~", "true", "1", "1e-5", "-0", "+.5", ".inf", "-.nan", "0x1",
    "1_0",
    "a: b", "a #b", "#a", "- a", "-", "?", "? a", ":", ": a", "[a", "a]", "{", "}", ",", "a,b", "&a", "*a", "!a",
    "!!str", "|",
    ">", "%a", "@a", "`a", "'", '"', "''", "'a'", '"a"', "\\", "\\n", "\n", "\n\n", " \n", "\n ", "a\n", "a\n\n",
    "a\nb", "\na",
    "a\n b\n", " a\nb", "a \nb", "\ta", "a\t", "a\tb", "\t", "a\n\tb", "\r", "\r\n", "a\r\nb", "\x85", "a\x85b",
    "\u2028",
    "\u2029x", "\ufeff", "\ufeffa", "\0", "\x07", "\x1b[0m", "\x7f", "\xa0", "é", "🙂", "٣", "---", "...", "--- a",
    "a\n---\nb",
    "a\n...\n", "<<", "=", "<<<<<<< HEAD", "a" * 300, "a b " * 4000, "a\n" * 300, "x: y\n  - z\n", "{{ x }}",
    "{% if %}\n{{ a }}\n",
    "2001-01-01", "12:30", "9" * 700, "1e999", "#\n#", "a\n#b", "a:\n", "?\n", "\uffff", "\ue000", "\U0010ffff",
]  # fmt: skip

texts = st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.text(
    alphabet=" \n\t\r:#-'\"|>?&*!%@`[]{},a1.~\\\x85\u2028", max_size=12
)  # fmt: skip
scalars = texts | st.none() | st.booleans() | st.integers(-(10**60), 10**60) | st.floats(allow_nan=False)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)


def same(a: Any, b: Any) -> bool:
    """Equal in types too: 1 is not True, 1.0 is not 1, -0.0 is not 0.0."""
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)
