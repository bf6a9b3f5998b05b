"""The chat template that a checkpoint brings, and the one that members of a stack bring together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stackctl.storage import files

TEMPLATE_FILE = "chat_template.jinja"


def own_template(folder: Path) -> str | None:
    """The chat template that lies in a checkpoint's folder, where transformers looks for it."""
    if (file := folder / TEMPLATE_FILE).is_file():
        return files.read_bounded(file).decode("utf-8-sig", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = files.read_json_if_any(folder / name).get("chat_template")
        if isinstance(template, str) and template:
            return template
    return None


def templates_of(checkpoints: Iterable[tuple[str, Path]]) -> list[tuple[str, str]]:
    """The labels and templates of those checkpoints that bring one, the newest first: a stack's last member."""
    found = [(label, own_template(folder)) for label, folder in checkpoints]
    return [(label, template) for label, template in reversed(found) if template]
