"""A safetensors file written tensor by tensor is one, and what the disk holds instead of it is noticed."""

import hashlib
import os

import pytest

from stackctl.core.errors import VerificationFailed
from stackctl.engine import safetensors_writer as streaming
from stackctl.engine.safetensors_writer import SafetensorsWriter
from stackctl.lora.safetensors_header import read_header

LAYOUT = [("a", "F32", (2, 3)), ("b.weight", "BF16", (5,)), ("none", "F16", (0, 4)), ("c", "I64", (1, 1, 2))]
BYTES = [bytes(range(24)), bytes(range(10)), b"", bytes(range(100, 116))]


def write(path):
    with SafetensorsWriter(path, LAYOUT) as writer:
        for (name, _, _), data in zip(LAYOUT, BYTES, strict=True):
            writer.write(name, memoryview(data))
    return writer


@pytest.mark.parametrize("stretch", [1, 30, 1 << 20])
def test_what_was_written_is_there_and_hashed(tmp_path, monkeypatch, stretch):
    monkeypatch.setattr(streaming, "_STRETCH", stretch)
    digest = write(tmp_path / "f").check()
    content = (tmp_path / "f").read_bytes()
    assert digest == "sha256:" + hashlib.sha256(content).hexdigest()
    header = read_header(tmp_path / "f")
    assert [(t.name, t.dtype, t.shape) for t in header.values()] == LAYOUT
    assert [content[t.start : t.end] for t in header.values()] == BYTES
    assert next(iter(header.values())).start % 8 == 0


@pytest.mark.parametrize("offset", [0, -1, -20])
def test_a_byte_that_changes_on_the_disk_is_5(tmp_path, monkeypatch, offset):
    """The flush is where the disk could go wrong: here it turns a byte over."""
    flush = os.fsync

    def spoil(descriptor):
        flush(descriptor)
        size = os.fstat(descriptor).st_size
        place = offset % size
        os.pwrite(descriptor, bytes([os.pread(descriptor, 1, place)[0] ^ 1]), place)

    monkeypatch.setattr(streaming.os, "fsync", spoil)
    writer = write(tmp_path / "f")
    with pytest.raises(VerificationFailed, match="other bytes than were written"):
        writer.check()


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(streaming.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "f")


def test_the_order_and_sizes_of_the_layout_hold(tmp_path):
    with pytest.raises(AssertionError, match="is not a"), SafetensorsWriter(tmp_path / "f", LAYOUT) as writer:
        writer.write("b.weight", memoryview(BYTES[1]))
    with pytest.raises(AssertionError, match="F32"), SafetensorsWriter(tmp_path / "f", LAYOUT) as writer:
        writer.write("a", memoryview(BYTES[1]))
    with pytest.raises(AssertionError, match="every tensor"), SafetensorsWriter(tmp_path / "f", LAYOUT) as writer:
        writer.write("a", memoryview(BYTES[0]))
