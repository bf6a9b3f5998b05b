"""The chat template that an adapter brings, for a base that has none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from stackctl.plan.model import StackPlan
from stackctl.registry.base_models import read_json


def adopt_chat_template(tokenizer: Any, base: str, plans: Iterable[StackPlan]) -> str | None:
    """Give the tokenizer of a base without a chat template the one that its adapters bring, and what to say of it.

    A base's own template is left as it is. Else it is that of the newest member of the first stack in which some member
    has one, since that is what the member was trained with; None where nobody has one.
    """
    if tokenizer.chat_template:
        return None
    found = [
        (member.label, template)
        for plan in plans
        for member in reversed(plan.members)
        if (template := own_template(member.checkpoint.path))
    ]
    if not found:
        return None
    label, tokenizer.chat_template = found[0]
    others = sorted({other for other, template in found if template != tokenizer.chat_template})
    differ = f"; {', '.join(others)} would have another one" if others else ""
    return f"the base '{base}' has no chat template: that of {label} is used{differ}"


def own_template(folder: Path) -> str | None:
    """The chat template that lies in a checkpoint's folder, where transformers looks for it."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, str) and template:
                return template
    return None
