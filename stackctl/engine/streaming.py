"""Write safetensors files tensor by tensor: the header from shapes alone, so that memory holds one tensor at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from stackctl.checkpoint import DTYPE_BYTES

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAFETENSORS_NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


class SafetensorsWriter:
    """A safetensors file that is written in the order of its ``layout``: (name, safetensors dtype, shape) each.

    Format: https://github.com/huggingface/safetensors#format.
    """

    def __init__(self, path: Path, layout: Sequence[tuple[str, str, Sequence[int]]]) -> None:
        self._path = path
        self._left = list(layout)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, dtype, shape in layout:
            end = offset + math.prod(shape) * DTYPE_BYTES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        raw = json.dumps(header, separators=(",", ":")).encode()
        self._header = raw + b" " * (-len(raw) % 8)  # tensors begin at a multiple of eight bytes

    def __enter__(self) -> SafetensorsWriter:
        self._stream: BinaryIO = self._path.open("wb")
        self._stream.write(struct.pack("<Q", len(self._header)) + self._header)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of the layout, already in its dtype."""
        expected, dtype, shape = self._left.pop(0)
        assert (name, tuple(shape)) == (expected, tuple(tensor.shape)), f"{name} is not {expected} {shape}"
        assert tensor.dtype == TORCH_DTYPES.get(dtype, tensor.dtype), f"{name} is not {dtype}"
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            self._stream.write(memoryview(data.flatten().view(torch.uint8).numpy()).cast("B"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        assert kind is not None or not self._left, "every tensor of the layout is written"
