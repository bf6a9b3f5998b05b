"""The header of a safetensors file: names, dtypes, shapes and places, never tensors.

The format (https://github.com/huggingface/safetensors#format): eight bytes of little-endian length, then JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from stackctl.core.errors import NotFound, VerificationFailed
from stackctl.storage.files import MAX_TEXT_BYTES

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
DTYPE_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _HeaderEntry(msgspec.Struct):
    """One entry of a header; few dimensions, so that multiplying them takes no time."""

    dtype: str
    shape: Annotated[list[_Size], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file: where its bytes are, counted from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The header of a safetensors file, checked against the file's size.

    Raises:
        NotFound: no such file.
        VerificationFailed: the header lies, overlaps or is cut off.
    """

    def damaged(why: str) -> VerificationFailed:
        return VerificationFailed(f"{path} is damaged: {why}", hint="restore the file from where it came")

    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_TEXT_BYTES):
                raise damaged("its header is longer than the file, or than any header")
            raw = stream.read(length)
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist") from None
    try:
        header = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError):
        raise damaged("its header is not JSON, or names something twice") from None
    if not isinstance(header, dict):
        raise damaged("its header is not a mapping")
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        tensors[name] = _tensor_info(name, info, 8 + length, damaged)
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.start, t.end)):
        if tensor.start != end:
            raise damaged(f"the bytes of {tensor.name[:80]!r} overlap others or leave a hole")
        end = tensor.end
    if end != size:
        raise damaged(f"it has {size} bytes where its header says {end}")
    return tensors


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are distinct and can be written down; readers differ in which duplicate they take."""
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("duplicate name")
    "".join(mapping).encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
    return mapping


def _tensor_info(name: str, info: Any, data_start: int, damaged: Any) -> TensorInfo:
    try:
        entry = msgspec.convert(info, _HeaderEntry, strict=True)
    except (msgspec.ValidationError, UnicodeEncodeError):  # the latter for half a character
        raise damaged(f"its header's entry {name[:80]!r} is malformed") from None
    dtype, shape, (start, end) = entry.dtype, entry.shape, entry.data_offsets
    if dtype not in DTYPE_BYTES:
        raise damaged(f"the dtype {dtype[:20]!r} of {name[:80]!r} is not known")
    if end - start != math.prod(shape) * DTYPE_BYTES[dtype]:
        raise damaged(f"the size of {name[:80]!r} does not fit its shape")
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)
