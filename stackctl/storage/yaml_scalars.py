"""What a plain (unquoted) scalar of YAML means: the core schema of YAML 1.2."""

from __future__ import annotations

import math
import re
from typing import Any

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_MAX_DIGITS = 640  # what Python converts whatever its limit (sys.set_int_max_str_digits) is


def parse_scalar(text: str) -> Any:
    """A plain (unquoted) scalar as YAML 1.2's core schema reads it; a number too large to be one stays text."""
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text[0] in "tT"
    if _INT.fullmatch(text):
        return int(text) if len(text) <= _MAX_DIGITS else text
    if _FLOAT.fullmatch(text):
        value = float(text)
        return value if math.isfinite(value) else text
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text
