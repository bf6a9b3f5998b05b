"""Where caches lie: what is there serves every registry of a user, and can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The folder of converted models, tokenised data and indices."""
    if value := os.environ.get("STACKCTL_CACHE"):
        return Path(value)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stackctl"
