"""What the types of entries are made of: bounded numbers, an entry, a part of one."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

SCHEMA = 1
"""The version of every file that stackctl writes."""

HUGE = 1e300
Finite = Annotated[float, Meta(ge=-HUGE, le=HUGE)]
"""A number that is neither NaN nor infinite."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""How many; no more than any machine could hold, so that it can be divided and shown."""
Scalar = bool | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | Finite | str


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every registry file begins with."""

    schema: int = SCHEMA


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A piece of an entry: what is at its default is not written."""
