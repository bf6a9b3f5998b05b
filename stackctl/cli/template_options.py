"""The options that give arguments to a chat template, as commands have them besides training."""

from __future__ import annotations

from typing import Annotated

import typer

TEMPLATE_KWARGS = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", help="Arguments for the chat template, as a JSON object.", metavar="JSON"),
]
ENABLE_THINKING = Annotated[
    bool | None,
    typer.Option(
        "--enable-thinking/--no-enable-thinking",
        help="The chat template's argument of that name: whether the assistant thinks first.",
    ),
]
