"""What a person gives to a chat template: arguments by name, for a base, a job, a command or a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stackctl.core.errors import Usage

Arguments = dict[str, Any]
_NOT_THE_TEMPLATES = {
    *("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "documents"),
    *("chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}
"""Arguments of transformers' ``apply_chat_template`` that are not the template's."""
_HINT = """write JSON, as --chat-template-kwargs '{"enable_thinking": false}'"""


def template_arguments(
    given: str | Mapping[str, Any] | None, enable_thinking: bool | None = None, base: Mapping[str, Any] | None = None
) -> Arguments:
    """Arguments as an object or as its JSON text, ``enable_thinking`` among them; those of the base come last.

    Raises:
        Usage: it is no object, or an argument is not the template's.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise Usage(f"--chat-template-kwargs is not JSON ({error})", hint=_HINT) from None
    if given is not None and not isinstance(given, Mapping):
        raise Usage("--chat-template-kwargs is not an object", hint=_HINT)
    found = {**(base or {}), **(given or {})}
    if enable_thinking is not None:
        found["enable_thinking"] = enable_thinking
    check_template_arguments(found)
    return found


def check_template_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ``Usage`` where an argument for a chat template is none of a template's."""
    if wrong := sorted(_NOT_THE_TEMPLATES & set(arguments)):
        raise Usage(
            f"chat_template_kwargs has {', '.join(map(repr, wrong))}, which is not an argument of a chat template",
            hint="give what the template reads, such as enable_thinking",
        )
