"""Write safetensors files tensor by tensor: the header from shapes alone, so that memory holds one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from stackctl.core.errors import VerificationFailed
from stackctl.lora.safetensors_header import DTYPE_BYTES

SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_STRETCH = 32 << 20
"""How much is written before it is flushed and read back."""
_PIECE = 1 << 20


class SafetensorsWriter:
    """A safetensors file that is written in the order of its ``layout``: (name, safetensors dtype, shape) each.

    Format: https://github.com/huggingface/safetensors#format. Beside the writing, one thread hashes what is written
    and another flushes it to the disk and hashes what it reads back; ``check`` compares the two.
    """

    def __init__(self, path: Path, layout: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        self.path = path
        self._left = list(layout)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in layout:
            end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        raw += b" " * (-len(raw) % 8)  # tensors begin at a multiple of eight bytes
        self._header = struct.pack("<Q", len(raw)) + raw
        self._written, self._read_back = hashlib.sha256(), hashlib.sha256()
        self._hasher, self._reader = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._hashing: Future[None] | None = None
        self._reading: list[Future[None]] = []
        self._offset = self._handed_on = 0

    def __enter__(self) -> SafetensorsWriter:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        self._put(memoryview(self._header))
        return self

    def write(self, name: str, data: memoryview) -> None:
        """The bytes of the layout's next tensor. They must stay as they are until the one after it is written."""
        expected, dtype, shape = self._left.pop(0)
        assert name == expected, f"{name} is not {expected}"
        assert len(data) == math.prod(shape) * DTYPE_BYTES[dtype], f"{name} is not {dtype} {shape}"
        self._put(data)

    def _put(self, data: memoryview) -> None:
        if self._hashing is not None:
            self._hashing.result()  # one tensor behind at most, so that memory stays bounded
        self._hashing = self._hasher.submit(self._written.update, data)
        while data:
            count = os.write(self._file, data)
            self._offset, data = self._offset + count, data[count:]
        if self._offset - self._handed_on >= _STRETCH:
            self._hand_on()

    def _hand_on(self) -> None:
        """Let what was written since the last time be flushed and read back."""
        self._reading.append(self._reader.submit(self._flush_and_read, self._handed_on, self._offset))
        self._handed_on = self._offset

    def _flush_and_read(self, start: int, end: int) -> None:
        os.fsync(self._file)
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(start)
            while start < end and (piece := stream.read(min(_PIECE, end - start))):
                self._read_back.update(piece)
                start += len(piece)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                assert not self._left, "every tensor of the layout is written"
                self._hand_on()
                for future in self._reading:
                    future.result()
        finally:
            self._hasher.shutdown()
            self._reader.shutdown(cancel_futures=True)
            os.close(self._file)

    def check(self) -> str:
        """Compare what was read back with what was written; returns the ``sha256:<hex>`` of the file.

        Raises:
            VerificationFailed: the file holds something else.
        """
        digest = self._written.hexdigest()
        if self._read_back.hexdigest() != digest:
            raise VerificationFailed(f"{self.path} holds other bytes than were written", hint="check the disk")
        return f"sha256:{digest}"
