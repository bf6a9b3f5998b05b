"""How an entry looks in its file."""

from __future__ import annotations

from typing import Any

from stackctl.storage.yaml_text import Flow, format_yaml


def format_entry(entry: dict[str, Any]) -> str:
    """The text of an entry's file."""
    return format_yaml(on_one_line(entry))


def on_one_line(value: Any, depth: int = 0) -> Any:
    """Small mappings without mappings inside are written on one line, which people and diffs read best."""
    if isinstance(value, dict):
        inner = {key: on_one_line(item, depth + 1) for key, item in value.items()}
        flat = depth > 1 and inner and not any(isinstance(item, dict) for item in inner.values())
        return Flow(inner) if flat and len(str(inner)) < 400 else inner
    if isinstance(value, list):
        return [on_one_line(item, depth + (0 if isinstance(item, dict) else 1)) for item in value]
    return value
