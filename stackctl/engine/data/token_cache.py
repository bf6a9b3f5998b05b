"""Tokenised data, kept under a digest of everything that decides what comes out.

That is the data's bytes, the tokenizer with its chat template and what is given to it, the date where it shows one,
the settings, and the code that makes examples of them.
An entry is a folder that gets its name when it is whole, so that runs at the same time do no harm: one of them names
it, and the others take it.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from stackctl.core.errors import Usage
from stackctl.engine.data.chat_template import is_dated, run_date
from stackctl.engine.data.encoding import Reading, encode, encode_pieces
from stackctl.engine.data.examples import IGNORED, Encoded, EncodeOptions, Example, LazySequence
from stackctl.engine.records.read import RecordStream
from stackctl.registry.garbage_collection import free_tokens, tokens_folder
from stackctl.storage import atomic
from stackctl.storage.hashes import sha256_file

_EXAMPLES, _ABOUT = "examples.arrow", "about.json"


def encode_cached(
    records: RecordStream,
    tokenizer: Any,
    options: EncodeOptions,
    reading: Reading = lambda _: None,
    *,
    cache: bool = True,
) -> Encoded:
    """What :func:`stackctl.engine.data.encoding.encode` makes, from the cache if it is there, else made and kept.

    With the cache, examples lie on disk and are read one by one, so that data may be larger than memory; without it, or
    where its folder cannot be written, they are in memory. The numbers are the same. ``records`` knows its format and
    count afterwards.

    Raises:
        Usage: bad records, a conversation that the template refuses, nothing to learn, or data that changed meanwhile.
    """
    root = tokens_folder()
    if not cache or not _can_write(root):
        return encode(records, tokenizer, options, reading)
    settings = [options.max_length, options.split_long, options.answers, records.labelled, dict(options.template)]
    settings += [options.system] if options.system else []
    place = root / _key(records, tokenizer, settings)
    if (found := _read(place, records)) is not None:
        return replace(found, key=place.name)
    free_tokens(every=False, dry_run=False)
    with atomic.staging_directory(root) as staged:
        encoded = Encoded([])
        write_examples(staged / _EXAMPLES, encode_pieces(records, tokenizer, encoded, options, reading))
        if records.source.changed():
            raise Usage(f"{records.path} was changed while it was read", hint="run the command again")
        about = {**asdict(replace(encoded, examples=[])), "format": records.format, "count": records.count}
        (staged / _ABOUT).write_text(json.dumps(about))
        encoded.examples = ExampleStore(staged / _EXAMPLES)  # stays readable under its other name, and after removal
        with contextlib.suppress(Usage):  # another run was quicker
            atomic.publish_directory(staged, place)
    return replace(encoded, key=place.name)


def _can_write(root: Path) -> bool:
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(root, os.W_OK)


def _read(place: Path, records: RecordStream) -> Encoded | None:
    """An entry, or nothing if it is not there; one that is damaged is removed."""
    try:
        about = json.loads((place / _ABOUT).read_text())
        examples = ExampleStore(place / _EXAMPLES)
        records.format, records.count = about.pop("format"), about.pop("count")
        found = Encoded(**{**about, "examples": examples})
        os.utime(place)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        with contextlib.suppress(OSError):
            atomic.discard_folder(place)
        return None
    return found


def _key(records: RecordStream, tokenizer: Any, settings: list[Any]) -> str:
    kind = "".join(Path(records.path).suffixes[-2:]).lower()
    date = run_date().date().isoformat() if is_dated(tokenizer) else None
    parts = [records.sha256, kind, _tokenizer_digest(tokenizer), settings, date, _code_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _tokenizer_digest(tokenizer: Any) -> str:
    """Of every file that the tokenizer writes of itself, the chat template among them."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + sha256_file(path).encode())
    return digest.hexdigest()


@functools.cache
def _code_digest() -> str:
    """Of what makes examples of records: our code, and the versions of the libraries that it stands on."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for path in sorted([*here.glob("*.py"), *(here.parent / "records").glob("*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps([version(name) for name in ("transformers", "tokenizers", "jinja2")]).encode())
    return digest.hexdigest()


_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("learned", pa.list_(pa.bool_())), ("desired", pa.bool_())])
"""``learned`` tells the tokens that have a label; the label is the token itself."""


def write_examples(path: Path, pieces: Iterable[Sequence[Example]]) -> None:
    """Write examples as they come, some at a time."""
    with pa.ipc.new_file(str(path), _SCHEMA) as writer:
        for examples in pieces:
            columns = (
                [example.input_ids for example in examples],
                [[label != IGNORED for label in example.labels] for example in examples],
                [example.desired for example in examples],
            )
            arrays = [pa.array(column, known.type) for column, known in zip(columns, _SCHEMA, strict=True)]
            writer.write_batch(pa.record_batch(arrays, schema=_SCHEMA))


class ExampleStore(LazySequence[Example]):
    """The examples of a file that :func:`write_examples` wrote; nothing but their places is held in memory.

    Raises:
        OSError, pyarrow.ArrowException: the file is not there or not whole.
    """

    def __init__(self, path: Path) -> None:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema != _SCHEMA:
            raise pa.ArrowInvalid("another schema")
        self._batches: list[Any] = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in self._batches))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def _item(self, number: int) -> Example:
        place = bisect.bisect_right(self._ends, number)
        batch = self._batches[place]
        row = number - (self._ends[place] - batch.num_rows)
        ids = np.from_dlpack(batch.column(0)[row].values)  # to_numpy imports pandas
        learned = batch.column(1)[row].values.to_pylist()
        labels = np.where(learned, ids, IGNORED).tolist()
        return Example(ids.tolist(), labels, desired=batch.column(2)[row].as_py())

    def lengths(self) -> np.ndarray:
        """The tokens of each example."""
        found = [np.diff(np.from_dlpack(batch.column(0).offsets)) for batch in self._batches]
        return np.concatenate(found) if found else np.zeros(0, np.int32)
