"""JSON on one line, whoever splits it into lines."""

from __future__ import annotations

import json
from typing import Any

_SEPARATORS = str.maketrans({sign: f"\\u{ord(sign):04x}" for sign in "\x85\u2028\u2029"})
"""Ends of lines for Unicode, and so for Python's ``str.splitlines``, that JSON leaves as they are."""


def json_line(value: Any) -> str:
    """A value as JSON without an end of line of any kind in it.

    Raises:
        ValueError: a number in it is not finite.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_SEPARATORS)
