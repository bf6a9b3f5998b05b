"""Records to tokens and labels, rows of documents, and batches without padding."""

from stackctl.engine.data.adapter_template import adopt_chat_template
from stackctl.engine.data.chat_template import CHATML, ensure_chat_template, fix_date, prefix_ids, shown_date
from stackctl.engine.data.encoding import Reading, encode
from stackctl.engine.data.examples import IGNORED, Encoded, Example
from stackctl.engine.data.rows import Rows, collate, lengths_of, one_by_one, pack, pairs_of
from stackctl.engine.data.turns import end_of_turn

__all__ = [
    "CHATML",
    "IGNORED",
    "Encoded",
    "Example",
    "Reading",
    "Rows",
    "adopt_chat_template",
    "collate",
    "encode",
    "end_of_turn",
    "ensure_chat_template",
    "fix_date",
    "lengths_of",
    "one_by_one",
    "pack",
    "pairs_of",
    "prefix_ids",
    "shown_date",
]
