"""Write safetensors files tensor by tensor: the header from shapes alone, so that memory holds one tensor at a time."""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from stackctl.checkpoint import DTYPE_BYTES
from stackctl.engine.tensors import TORCH_DTYPES, all_finite
from stackctl.errors import VerificationFailed
from stackctl.files import sha256_file

SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsWriter:
    """A safetensors file that is written in the order of its ``layout``: (name, safetensors dtype, shape) each.

    Format: https://github.com/huggingface/safetensors#format. What is written is hashed on its way, beside the
    writing, and compared with the file afterwards (``check``).
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
        self._digest = hashlib.sha256(self._header)
        self._hasher = concurrent.futures.ThreadPoolExecutor(1)
        self._hashing: concurrent.futures.Future[None] | None = None

    def __enter__(self) -> SafetensorsWriter:
        self._stream: BinaryIO = self.path.open("wb")
        self._stream.write(self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the layout, in its dtype already.

        Raises:
            VerificationFailed: it holds NaN or infinity, which it got by not fitting its dtype.
        """
        expected, dtype, shape = self._left.pop(0)
        assert (name, tuple(shape)) == (expected, tuple(tensor.shape)), f"{name} is not {expected} {shape}"
        assert tensor.dtype == TORCH_DTYPES[dtype], f"{name} is not {dtype}"
        if not all_finite(tensor):
            raise VerificationFailed(f"{name} does not fit {dtype}", hint="use --dtype float32")
        data = tensor.detach().cpu().contiguous().flatten()
        if data.numel():
            view = memoryview(data.view(torch.uint8).numpy()).cast("B")
            if self._hashing is not None:
                self._hashing.result()  # one tensor behind at most, so that memory stays bounded
            self._hashing = self._hasher.submit(self._digest.update, view)
            self._stream.write(view)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hasher.shutdown()
        if kind is None:
            assert not self._left, "every tensor of the layout is written"
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._stream.close()

    def check(self) -> None:
        """Read the file back and compare it with what was written.

        Raises:
            VerificationFailed: the disk holds something else.
        """
        if sha256_file(self.path) != "sha256:" + self._digest.hexdigest():
            raise VerificationFailed(f"{self.path} holds other bytes than were written", hint="check the disk")
