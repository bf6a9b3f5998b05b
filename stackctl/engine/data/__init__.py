"""Records to tokens and labels, rows of documents, and batches without padding."""

from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import IGNORED, Encoded, Example
from stackctl.engine.data.rows import collate, pack
from stackctl.engine.data.templates import CHATML, end_of_turn, ensure_chat_template, prefix_ids

__all__ = [
    "CHATML",
    "IGNORED",
    "Encoded",
    "Example",
    "collate",
    "encode",
    "end_of_turn",
    "ensure_chat_template",
    "pack",
    "prefix_ids",
]
