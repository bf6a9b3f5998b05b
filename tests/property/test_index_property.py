"""Whatever is done to the entries' files, in whatever order, rows with an index are the rows without."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stackctl.registry import index

NAMES = st.sampled_from("abc")
TEXTS = st.sampled_from(["one", "two", "three", "four", ""])
STEPS = st.one_of(
    st.tuples(st.just("write"), NAMES, TEXTS),
    st.tuples(st.just("replace"), NAMES, TEXTS),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("remove"), NAMES, st.none()),
    st.tuples(st.just("set back"), NAMES, st.none()),
    st.tuples(st.just("damage the index"), st.integers(0, 200), st.none()),
    st.tuples(st.just("look"), st.none(), st.none()),
)


def act(folder: Path, what: str, first: object, second: object) -> None:
    path = folder / f"{first}.yaml"
    if what == "write":
        path.write_text(str(second))
    elif what == "replace":
        (folder / "new").write_text(str(second))
        (folder / "new").replace(path)
    elif what == "damage the index":
        kept = index.index_path(folder)
        if kept.is_file() and (data := bytearray(kept.read_bytes())):
            data[int(str(first)) % len(data)] ^= 0x55
            kept.write_bytes(data)
    elif path.is_file():
        if what == "rename":
            path.rename(folder / f"{second}.yaml")
        elif what == "remove":
            path.unlink()
        elif what == "set back":
            os.utime(path, ns=(0, 0))


@settings(max_examples=60)
@given(steps=st.lists(STEPS, max_size=25), waiting=st.booleans())
def test_rows_with_an_index_are_the_rows_without(steps, waiting):
    """``waiting``: between any two steps enough time goes by, for the clock of the index and for that of the files."""
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        folder = Path(place)
        patch.setenv("STACKCTL_CACHE", str(folder / "cache"))
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(index, "_WORTH_KEEPING", 1)
        if waiting:
            patch.setattr(index, "time", SimpleNamespace(time=lambda: time.time() + 10))

        def read(name: str) -> str:
            return (folder / f"{name}.yaml").read_text()

        for step in [*steps, ("look", None, None)]:
            if waiting:
                time.sleep(0.005)  # more than a tick of the kernel's clock
            act(folder, *step)
            if step[0] in ("look", "damage the index"):
                rows = index.read_rows(folder, str, read, lambda share: None)
                found = dict(zip(rows.names, rows, strict=True))
                assert found == {p.stem: p.read_text() for p in folder.glob("*.yaml")}
