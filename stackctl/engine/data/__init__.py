"""Records to tokens and labels, rows of documents, and batches without padding."""

from typing import TYPE_CHECKING

from stackctl.core.on_demand import on_demand
from stackctl.engine.data.chat_template import (
    CHATML,
    adopt_chat_template,
    ensure_chat_template,
    fix_date,
    prefix_ids,
    shown_date,
)
from stackctl.engine.data.examples import IGNORED, Encoded, Example
from stackctl.engine.data.turns import end_of_turn

if TYPE_CHECKING:
    from stackctl.engine.data.encoding import Reading, encode
    from stackctl.engine.data.rows import (
        TEACHER,
        Rows,
        TaughtExamples,
        collate,
        lengths_of,
        longest_of,
        one_by_one,
        pack,
        pairs_of,
        split_row,
        starts_of,
    )

__all__ = [
    "CHATML",
    "IGNORED",
    "TEACHER",
    "Encoded",
    "Example",
    "Reading",
    "Rows",
    "TaughtExamples",
    "adopt_chat_template",
    "collate",
    "encode",
    "end_of_turn",
    "ensure_chat_template",
    "fix_date",
    "lengths_of",
    "longest_of",
    "one_by_one",
    "pack",
    "pairs_of",
    "prefix_ids",
    "shown_date",
    "split_row",
    "starts_of",
]

# With torch, numpy and pyarrow, which nobody needs who renders a prompt.
__getattr__ = on_demand(
    __name__,
    encoding=("Reading", "encode"),
    rows=(
        "TEACHER",
        "Rows",
        "TaughtExamples",
        "collate",
        "lengths_of",
        "longest_of",
        "one_by_one",
        "pack",
        "pairs_of",
        "split_row",
        "starts_of",
    ),
)
