"""Records from files and from the Hub, checked before anything is computed."""

from stackctl.engine.records.prompt_files import Prompt, read_prompt_file
from stackctl.engine.records.read import RecordStream, open_records, read_records
from stackctl.engine.records.types import (
    ChatRecord,
    CompletionRecord,
    Format,
    Message,
    PreferenceRecord,
    Record,
    RecordSet,
    TextRecord,
)

__all__ = [
    "ChatRecord",
    "CompletionRecord",
    "Format",
    "Message",
    "PreferenceRecord",
    "Prompt",
    "Record",
    "RecordSet",
    "RecordStream",
    "TextRecord",
    "open_records",
    "read_prompt_file",
    "read_records",
]
