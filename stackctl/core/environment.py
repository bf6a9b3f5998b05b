"""What environment variables say."""

from __future__ import annotations

import contextlib
import math
import os

from stackctl.core.errors import Usage

_DEFAULT_SECONDS = 60


def seconds_setting(name: str) -> float:
    """The seconds that an environment variable says, 0 or more; a minute where it is not set, or empty.

    Raises:
        Usage: it says no number of seconds.
    """
    text = os.environ.get(name) or str(_DEFAULT_SECONDS)
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(text)) < math.inf:
            return seconds
    raise Usage(f"{name} is '{text}', which is not a number of seconds", hint=f"unset {name}")
