"""A chat template rendered as transformers renders it, without transformers, which takes seconds to load.

The environment, what templates may call in it, and what happens to messages before they get there, are those of
``transformers/utils/chat_template_utils.py`` and of ``apply_chat_template`` in ``tokenization_utils_base.py``; what
goes in comes from JSON here, and no more is taken. The tests hold every text against theirs.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stackctl.engine.data.chat_template import run_date
from stackctl.engine.records.types import Message

_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""The keys of a turn's thought in transformers' own order (``_REASONING_FIELDS`` in 5.23)."""


def render_template(
    source: str, messages: Sequence[Message], tools: list[Any] | None, *, prompt: bool, variables: Mapping[str, Any]
) -> str:
    """The text of a conversation, with the generation prompt behind it if it is asked for.

    ``variables`` are what else the template sees: special tokens, and arguments.

    Raises:
        jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError: what the template raises.
    """
    if not messages:
        raise ValueError("a chat template takes no empty conversation")
    template = _compiled(source)
    if not all(isinstance(tool, dict) for tool in tools or ()):
        raise ValueError("tools are JSON objects")
    shown = [_with_thought({key: value for key, value in turn.items() if value is not None}) for turn in messages]
    given = copy.deepcopy({**variables, "messages": shown, "tools": tools})
    return template.render({"documents": None, **given, "add_generation_prompt": prompt})


def _with_thought(turn: Message) -> Message:
    """A turn with its thought under every key that a template may read it from."""
    thought = next((turn[key] for key in _THOUGHTS if turn.get(key) is not None), None)
    return turn if thought is None else {"thinking": thought, **turn, "reasoning_content": thought}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda layout: run_date().strftime(layout),
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment.from_string(source)


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says; for the text it is nothing."""

    tags = {"generation"}  # noqa: RUF012  # as jinja2 annotates it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> Any:
        return caller()


class _Dict:
    """``dict`` without the class's own attributes, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """``namespace`` without names that begin with an underscore, which lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that ``namespace(self=…)`` is one of its names
        given = dict(*args[1:], **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """Not jinja2's own, which writes ``<`` and its like as HTML has them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
