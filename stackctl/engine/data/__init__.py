"""Records to tokens and labels, rows of documents, and batches without padding."""

from stackctl.engine.data.chat_template import CHATML, ensure_chat_template, prefix_ids
from stackctl.engine.data.encoding import Reading, encode
from stackctl.engine.data.examples import IGNORED, Encoded, Example
from stackctl.engine.data.rows import Rows, collate, lengths_of, one_by_one, pack
from stackctl.engine.data.turns import end_of_turn

__all__ = [
    "CHATML",
    "IGNORED",
    "Encoded",
    "Example",
    "Reading",
    "Rows",
    "collate",
    "encode",
    "end_of_turn",
    "ensure_chat_template",
    "lengths_of",
    "one_by_one",
    "pack",
    "prefix_ids",
]
