"""What a person gives to a chat template: arguments by name, for a base, a job, a command or a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from stackctl.core.errors import Usage
from stackctl.core.fields import Scalar

Arguments = dict[str, Any]
_NOT_THE_TEMPLATES = {
    *("messages", "conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "documents"),
    *("chat_template", "padding", "truncation", "max_length", "return_tensors", "return_dict", "tokenizer_kwargs"),
    *("return_assistant_tokens_mask", "sanitize_control_tokens"),
}
"""Arguments of transformers' ``apply_chat_template`` that are not the template's."""
_DEEPEST = 100
"""Levels of lists and objects: whoever copies or writes out what is nested needs a call for each."""
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
            given = json.loads(given, parse_constant=_refuse)
        except ValueError as error:
            raise Usage(f"--chat-template-kwargs is not JSON ({error})", hint=_HINT) from None
        except RecursionError:
            raise Usage("--chat-template-kwargs is nested too deeply", hint=_HINT) from None
    if given is not None and not isinstance(given, Mapping):
        raise Usage("--chat-template-kwargs is not an object", hint=_HINT)
    found = {**(base or {}), **(given or {})}
    if enable_thinking is not None:
        found["enable_thinking"] = enable_thinking
    check_template_arguments(found)
    return found


def check_template_arguments(arguments: Mapping[str, Any]) -> None:
    """Raises ``Usage`` where an argument for a chat template is none of a template's, or cannot be written down."""
    if wrong := sorted(_NOT_THE_TEMPLATES & set(arguments)):
        raise Usage(
            f"chat_template_kwargs has {', '.join(map(repr, wrong))}, which is not an argument of a chat template",
            hint="give what the template reads, such as enable_thinking",
        )
    if not _is_shallow(arguments, _DEEPEST):
        raise Usage("chat_template_kwargs is nested too deeply", hint="give what the template reads")
    try:
        json.dumps(arguments, ensure_ascii=False, skipkeys=True, default=str, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Usage(
            "chat_template_kwargs holds half a character (a lone surrogate)", hint="write the whole character"
        ) from None
    except ValueError:
        what = "chat_template_kwargs holds a number that is not finite"
        raise Usage(what, hint="write a number below 1e300") from None


def check_recorded(arguments: Mapping[str, Any]) -> None:
    """Raises ``Usage`` where an argument is no value that an entry of the registry holds."""
    for name, value in arguments.items():
        try:
            msgspec.convert(value, Scalar)
        except msgspec.ValidationError:
            raise Usage(
                f"chat_template_kwargs: {name!r} is recorded, and is no text, truth value or number of at most 64 bits",
                hint="lists and objects are for single records: write them there as chat_template_kwargs",
            ) from None


def _is_shallow(value: Any, levels: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(each, levels - 1) for each in inner)


def _refuse(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")
