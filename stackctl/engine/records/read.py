"""Records from files and from the Hub, checked before anything is computed.

What is wrong with a file is said at once and by line, so that one run of the command is enough to repair it. Nothing
is repaired silently: a record that is dropped or guessed at changes what the model learns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stackctl.core.errors import SHOWN_PROBLEMS, Usage, listed_problems
from stackctl.core.hub_ids import parse_dataset_id
from stackctl.engine.records import sources
from stackctl.engine.records.raw_lines import is_packed, suffix_of
from stackctl.engine.records.shapes import SHAPE_HINT, checked_shape, parse
from stackctl.engine.records.sources import KINDS_HINT
from stackctl.engine.records.types import BadRecord, Format, Record, Unit
from stackctl.render.terminal import counted
from stackctl.storage.paths import missing_path, typed_path

_ELSEWHERE = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "is a spreadsheet, which is not read: save it as CSV"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".zst", ".7z"), "is an archive, which is not read: unpack it"),
    **dict.fromkeys((".arrow", ".feather", ".orc"), "is a table that is not read: save it as Parquet"),
    **dict.fromkeys((".pkl", ".pickle", ".pt", ".bin"), "may run code when it is read: save it as JSON Lines"),
    **dict.fromkeys((".md", ".markdown", ".rst"), "is one text: give the folder that it lies in"),
    **dict.fromkeys((".pdf", ".docx", ".html"), "is a document with a layout, which is not read: save it as text"),
}
"""What else people have, in words."""


@dataclass
class RecordStream:
    """The records of one source, all of one shape: read and checked as they are asked for, so that memory holds a few
    at a time, or ``kept``, where all of them were read at once.

    ``format`` and ``count`` are known when ``records`` has ended. ``share`` is how much of the source was read, from 0
    to 1. ``sha256`` is that of the file's bytes, or of a Hub data set's fingerprint.
    """

    source: sources.Source
    labelled: bool = False
    """Whether each record has to have a label, true or false, that is read."""
    format: Format = "text"
    count: int = 0
    share: float = 0.0
    ignored: Counter[str] = field(default_factory=Counter)
    """Keys that mean something elsewhere and nothing here, with how many records have them."""
    left_out: int = 0
    """Records that say themselves that they are not to be learned."""
    kept: Sequence[Record] | None = None

    @property
    def path(self) -> str:
        return self.source.name

    @property
    def sha256(self) -> str:
        return self.source.sha256

    @property
    def unit(self) -> Unit:
        return self.source.unit

    def place(self, number: int) -> str:
        """``line 3``: where a record stands, for messages."""
        return f"{self.unit} {number}"

    @property
    def records(self) -> Iterable[Record]:
        """Every record, from the first. Once one was bad no more come, but the rest is read to name all that are bad.

        Raises:
            Usage: there are no records, or some are bad (the first five are named).
        """
        return self._read() if self.kept is None else self.kept

    def _read(self) -> Iterator[Record]:
        problems: list[str] = []
        first: tuple[Format, int] | None = None
        self.count = self.left_out = bad = 0
        self.ignored.clear()
        for number, value in self.source.values(self._seen):
            try:
                if isinstance(value, BadRecord):
                    raise value
                shape = checked_shape(value)
                first = first or (shape.format, number)
                if shape.format != first[0]:
                    before = f"{self.place(first[1])} that of '{first[0]}'"
                    raise BadRecord(f"has the shape of '{shape.format}', but {before}")
                record, ignored = parse(number, value, shape, labelled=self.labelled)
            except BadRecord as error:
                bad += 1
                if bad <= SHOWN_PROBLEMS:
                    column = f", column {error.column}" if error.column else ""
                    problems.append(f"{self.place(number)}{column}: {error}")
                continue
            self.ignored.update(ignored)
            self.left_out += record is None
            if not bad and record is not None:
                self.format, self.count = shape.format, self.count + 1
                yield record
        if bad:
            raise Usage(f"{self.path}: {listed_problems(problems, bad)}", hint=SHAPE_HINT)
        if not self.count:
            if self.left_out:
                raise Usage(
                    f"{self.path} holds nothing but records with 'label': false (for KTO, what is to be avoided)",
                    hint="give records that are to be learned",
                )
            raise Usage(f"{self.path} holds no records", hint=SHAPE_HINT)

    @property
    def notes(self) -> list[str]:
        """What in the records was passed over, once ``records`` has ended."""
        notes = []
        if self.left_out:
            notes.append(f"{counted(self.left_out, 'record')} with 'label': false (for KTO, to be avoided) left out")
        if self.ignored:
            named = ", ".join(f"'{key}' ({counted(count, 'record')})" for key, count in self.ignored.most_common())
            notes.append(f"{self.path} has keys that mean nothing here and were ignored: {named}")
        return notes

    def _seen(self, share: float) -> None:
        self.share = share

    def peek_format(self) -> Format | None:
        """The shape of the first record that has one."""
        for _, value in self.source.values(lambda _: None):
            try:
                return checked_shape(value).format
            except BadRecord:
                continue
        return None


def open_records(source: str | Path) -> RecordStream:
    """The records of a file or of a Hub data set: ``org/name``, which is ``org/name:train``, or another split.

    A ``.txt`` file holds documents separated by blank lines: a record per line would cut prose into sentences, and one
    record per file could not be shuffled. Text whose paragraphs belong together is better given as ``{"text"}``.

    Raises:
        NotFound: there is no such file or data set.
        Usage: the wrong kind of file.
        HubFailure: the Hub could not be asked.
    """
    name, path = str(source), typed_path(str(source), what="--data")
    if not path.exists():
        if found := parse_dataset_id(name):
            return RecordStream(sources.open_hub_dataset(*found))
        raise missing_path(path, "the data file")
    if path.is_dir():
        return RecordStream(sources.open_folder(path, name))
    if not path.is_file():
        raise Usage(f"{name} is not a file, not a data file", hint=KINDS_HINT)
    suffix = suffix_of(path)
    if is_packed(path) and suffix == ".parquet":
        raise Usage(f"{name} is packed Parquet, which is not read: unpack it", hint=KINDS_HINT)
    if suffix not in sources.READERS:
        what = _ELSEWHERE.get(suffix, f"is not a kind of data file that can be read ({suffix or 'it has no suffix'})")
        raise Usage(f"{name} {what}", hint=KINDS_HINT)
    return RecordStream(sources.READERS[suffix](path, name))


def read_records(source: str | Path) -> RecordStream:
    """All records of a source at once; see :func:`open_records`.

    Raises:
        NotFound, Usage, HubFailure: as there, or there are no records, or bad ones.
    """
    stream = open_records(source)
    stream.kept = list(stream.records)
    return stream
