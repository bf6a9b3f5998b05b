"""Records from files and from the Hub, checked before anything is computed."""

from stackctl.engine.records.kinds import ChatRecord, CompletionRecord, Format, Message, Record, RecordSet, TextRecord
from stackctl.engine.records.prompts import Prompt, read_prompt_file
from stackctl.engine.records.reading import RecordStream, open_records, read_records

__all__ = [
    "ChatRecord",
    "CompletionRecord",
    "Format",
    "Message",
    "Prompt",
    "Record",
    "RecordSet",
    "RecordStream",
    "TextRecord",
    "open_records",
    "read_prompt_file",
    "read_records",
]
