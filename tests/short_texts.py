"""Short texts that are alike, of which an adapter learns what the others have."""

from __future__ import annotations

from typing import Any


def texts(first: int, last: int) -> list[dict[str, Any]]:
    things, moods = ("sea", "gull", "boat", "rain", "shore", "night"), ("grey", "loud", "cold", "slow", "far", "still")
    return [{"text": f"The {a} was {b}, and nobody came."} for a in things for b in moods][first:last]
