"""Records from files and from the Hub, checked before anything is computed."""

from stackctl.engine.records.kinds import ChatRecord, CompletionRecord, Format, Message, Record, RecordSet, TextRecord
from stackctl.engine.records.prompts import Prompt, read_prompt_file
from stackctl.engine.records.reading import read_records

__all__ = [
    "ChatRecord",
    "CompletionRecord",
    "Format",
    "Message",
    "Prompt",
    "Record",
    "RecordSet",
    "TextRecord",
    "read_prompt_file",
    "read_records",
]
