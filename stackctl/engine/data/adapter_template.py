"""The chat template that an adapter brings, for a base that has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stackctl.plan.model import StackPlan
from stackctl.plan.own_template import templates_of


def adopt_chat_template(tokenizer: Any, base: str, plans: Iterable[StackPlan]) -> str | None:
    """Give the tokenizer of a base without a chat template the one that its adapters bring, and what to say of it.

    A base's own template is left as it is. Else it is that of the newest member of the first stack in which some member
    has one, since that is what the member was trained with; None where nobody has one.
    """
    if tokenizer.chat_template:
        return None
    found = [pair for plan in plans for pair in templates_of(plan.members)]
    if not found:
        return None
    label, tokenizer.chat_template = found[0]
    others = sorted({other for other, template in found if template != tokenizer.chat_template})
    differ = f"; {', '.join(others)} would have another one" if others else ""
    return f"the base '{base}' has no chat template: that of {label} is used{differ}"
