"""Entries of an older schema, read as today's.

A file says its schema. One that is older is taken up one number at a time when it is read, in memory; it is written in
today's schema with the next change of it, so that a registry needs no day on which everything is converted, and git
shows each conversion beside the change that brought it. A file of a newer schema is refused.

A new schema takes three steps: raise ``SCHEMA`` in :mod:`stackctl.core.fields` and change the types; append a
step here; freeze a registry of the schema before in ``tests/frozen/``; ``tests/integration/test_schema_1.py`` shows
how.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Step = Callable[[type, dict[str, Any]], dict[str, Any]]
"""The type that a file is read as and what it holds, one schema up.

What it holds has not been checked: a step leaves alone what it does not understand, and the check that comes after all
steps will say what is wrong with it.
"""

STEPS: tuple[Step, ...] = ()
"""``STEPS[n - 1]`` takes a file from schema n to n + 1. Schema 1 is the newest, so there is none yet."""


def migrate(value: dict[str, Any], kind: type, newest: int) -> dict[str, Any]:
    """A file's value in the newest schema; as it is where its ``schema`` is no older one."""
    found = value.get("schema")
    if not isinstance(found, int) or isinstance(found, bool) or not 1 <= found < newest:
        return value
    for number in range(found, newest):
        value = {**STEPS[number - 1](kind, value), "schema": number + 1}
    return value
