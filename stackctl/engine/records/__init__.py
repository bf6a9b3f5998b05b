"""Records from files and from the Hub, checked before anything is computed."""

from stackctl.engine.records.kinds import ChatRecord, CompletionRecord, Format, Message, Record, RecordSet, TextRecord
from stackctl.engine.records.reading import read_records

__all__ = [
    "ChatRecord",
    "CompletionRecord",
    "Format",
    "Message",
    "Record",
    "RecordSet",
    "TextRecord",
    "read_records",
]
