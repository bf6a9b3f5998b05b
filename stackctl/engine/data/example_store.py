"""Examples in an Arrow file that is mapped into memory: read one by one, as many as a disk holds."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from stackctl.engine.data.examples import IGNORED, Example, LazyExamples

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


class ExampleStore(LazyExamples):
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

    def _example(self, number: int) -> Example:
        place = bisect.bisect_right(self._ends, number)
        batch = self._batches[place]
        row = number - (self._ends[place] - batch.num_rows)
        ids = batch.column(0)[row].values.to_numpy()
        learned = batch.column(1)[row].values.to_numpy(zero_copy_only=False)
        labels = np.where(learned, ids, IGNORED).tolist()
        return Example(ids.tolist(), labels, desired=batch.column(2)[row].as_py())

    def lengths(self) -> np.ndarray:
        """The tokens of each example."""
        found = [np.diff(batch.column(0).offsets.to_numpy()) for batch in self._batches]
        return np.concatenate(found) if found else np.zeros(0, np.int32)
