"""The index of entries: what it saves, and that it is never believed where a file says otherwise."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from checkpoints import make_registry, register

from stackctl.core.errors import Usage
from stackctl.core.schema import Adapter
from stackctl.registry import Registry, index
from stackctl.registry.summaries import adapter_row
from stackctl.storage import files

pytestmark = pytest.mark.usefixtures("no_power_cuts")


@pytest.fixture(autouse=True)
def any_size_is_worth_it(monkeypatch):
    monkeypatch.setattr(index, "_WORTH_KEEPING", 1)


@pytest.fixture
def later(monkeypatch):
    """The clock as it will be when what is written now has settled."""
    monkeypatch.setattr(index, "time", SimpleNamespace(time=lambda: time.time() + 10))


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "entries"
    place.mkdir()
    for name in ("a", "b", "c"):
        (place / f"{name}.yaml").write_text(f"this is {name}")
    return place


class Reader:
    """Reads rows, and knows which files it had to open for them."""

    def __init__(self, folder):
        self.folder = folder
        self.opened = []

    def read(self, name):
        self.opened.append(name)
        path = self.folder / f"{name}.yaml"
        text = path.read_text() if path.is_file() else None
        if text == "broken":
            raise Usage(f"{path} is broken")
        return text

    def __call__(self):
        """All rows as a mapping, and the names of what was opened."""
        self.opened.clear()
        rows = index.read_rows(self.folder, str, self.read, lambda share: None)
        return dict(zip(rows.names, rows, strict=True)), list(self.opened)


def test_what_has_not_changed_is_not_opened_again(folder, later):
    read = Reader(folder)
    everything = {name: f"this is {name}" for name in "abc"}
    assert read() == (everything, ["a", "b", "c"])
    assert read() == (everything, [])
    (folder / "b.yaml").write_text("this is news")
    (folder / "d.yaml").write_text("this is d")
    changed = everything | {"b": "this is news", "d": "this is d"}
    assert read() == (changed, ["b", "d"])
    assert read() == (changed, [])
    assert Reader(folder)() == (changed, []), "another process knows it, too"


@pytest.mark.parametrize("how", ["in place", "another file"])
def test_an_edit_of_the_same_size_and_time_is_seen(folder, later, how):
    read = Reader(folder)
    read()
    path = folder / "b.yaml"
    before = path.stat()
    if how == "another file":
        path.unlink()
    path.write_text("THIS IS B")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    rows, opened = read()
    assert rows["b"] == "THIS IS B"
    assert opened == ["b"]


def test_a_file_that_changed_a_moment_ago_is_read_each_time(folder, monkeypatch):
    """Where the clock of the file system is so coarse that a second change would show in nothing."""
    monkeypatch.setattr(files, "state", lambda info: (info.st_size, 0, 0, 0))
    read = Reader(folder)
    read()
    (folder / "b.yaml").write_text("THIS IS B")
    assert read()[0]["b"] == "THIS IS B"
    assert read()[1] == ["a", "b", "c"]
    monkeypatch.setattr(index, "time", SimpleNamespace(time=lambda: time.time() + 10))
    read()
    (folder / "b.yaml").write_text("this is b")
    assert read()[0]["b"] == "THIS IS B", "without the rule about young files, this is what went wrong above"


def test_what_was_removed_or_renamed_by_hand(folder, later):
    read = Reader(folder)
    read()
    (folder / "a.yaml").unlink()
    (folder / "b.yaml").rename(folder / "z.yaml")
    assert read() == ({"c": "this is c", "z": "this is b"}, ["z"])
    (folder / "z.yaml").replace(folder / "c.yaml")
    assert read() == ({"c": "this is b"}, ["c"])
    (folder / "a.yaml").write_text("this is new")
    assert read() == ({"a": "this is new", "c": "this is b"}, ["a"])


def test_what_is_no_entry_is_no_row(folder, later):
    (folder / ".tmp-x.yaml").write_text("unfinished")
    (folder / "notes.txt").write_text("mine")
    (folder / "gone.yaml").symlink_to(folder / "nowhere")
    read = Reader(folder)
    assert list(read()[0]) == ["a", "b", "c"]
    assert index.read_rows(folder / "none", str, read.read, lambda share: None).names == []


def test_links_are_known_by_what_they_lead_to(folder, tmp_path, later):
    target = tmp_path / "elsewhere.yaml"
    target.write_text("from afar")
    (folder / "l.yaml").symlink_to(target)
    read = Reader(folder)
    assert read()[0]["l"] == "from afar"
    target.write_text("FROM AFAR")
    assert read()[0]["l"] == "FROM AFAR"


DAMAGE = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-3],
    "longer": lambda data: data + b"\0",
    "one bit": lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
    "the row's bytes": lambda data: data.replace(b"this is b", b"this is x"),
    "text": lambda data: b"schema: 1\n",
    "deep": lambda data: b"\x91" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_index_is_ignored_and_written_again(folder, later, damage):
    read = Reader(folder)
    everything, _ = read()
    path = index.index_path(folder)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    assert read() == (everything, ["a", "b", "c"])
    assert path.read_bytes() == whole
    assert read() == (everything, [])


def test_another_stackctl_made_it(folder, later, monkeypatch):
    read = Reader(folder)
    read()
    monkeypatch.setattr(index, "_MADE_BY", "another")
    assert read()[1] == ["a", "b", "c"]


def test_a_copied_registry_has_an_index_of_its_own(folder, tmp_path, later):
    Reader(folder)()
    shutil.copytree(folder, tmp_path / "copy")
    assert Reader(tmp_path / "copy")()[1] == ["a", "b", "c"]
    index.index_path(tmp_path / "copy").write_bytes(index.index_path(folder).read_bytes())
    assert Reader(tmp_path / "copy")()[1] == ["a", "b", "c"], "an index of another folder"


def test_nowhere_to_keep_it(folder, later, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "file"))
    read = Reader(folder)
    everything, _ = read()
    assert read() == (everything, ["a", "b", "c"])


def test_a_file_that_cannot_be_read_costs_nothing_of_the_others(folder, later):
    (folder / "b.yaml").write_text("broken")
    read = Reader(folder)
    with pytest.raises(Usage, match=r"b\.yaml is broken"):
        read()
    assert read.opened == ["a", "b"]
    (folder / "b.yaml").write_text("mended")
    assert read() == ({"a": "this is a", "b": "mended", "c": "this is c"}, ["b", "c"])


def test_a_small_registry_and_a_small_change_leave_no_index(folder, later, monkeypatch):
    monkeypatch.setattr(index, "_WORTH_KEEPING", 100)
    read = Reader(folder)
    read()
    path = index.index_path(folder)
    assert not path.exists()
    (folder / "large.yaml").write_text("x" * 1000)
    read()
    assert read()[1] == []
    (folder / "a.yaml").write_text("a little news")
    assert read()[1] == ["a"]
    assert read()[1] == ["a"], "not worth writing all of it again"


def test_progress_goes_up_to_one(folder, later):
    read, shares = Reader(folder), []
    index.read_rows(folder, str, read.read, shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) == 4


# -- in a registry --------------------------------------------------------------------------------------------------


def direct(registry):
    return [adapter_row(registry.find_adapter(name)) for name in registry.names(Adapter)]


def test_rows_say_what_the_entries_say(tmp_path, later):
    registry = make_registry(tmp_path / "registry")
    for number in range(3):
        register(registry, "style", seed=number)
    register(registry, "instruct", ["style@2:0.5"], seed=9)
    registry.save_stack("both", registry.resolve("style+instruct"))
    for _ in range(2):  # as parsed, and as kept
        assert list(registry.adapter_rows()) == direct(registry)
        assert list(registry.stack_rows()) == [registry.find_stack("both")]
    row = next(iter(registry.adapter_rows()))
    assert (row.name, [v.version for v in row.versions]) == ("instruct", [1])
    assert row.versions[0].trained_on == ["style@2:0.5"]


def test_what_is_asked_through_the_index(tmp_path, later):
    registry = make_registry(tmp_path / "registry")
    made = [register(registry, "style", seed=number) for number in range(3)]
    register(registry, "instruct", ["style@2:0.5"], seed=9)
    registry.save_stack("only", registry.resolve("style@3"))
    for _ in range(2):
        assert str(registry.find_digest(made[1].digest)) == "style@2"
        assert registry.resolve(made[1].digest[:20]).text == "style@2"
        with pytest.raises(Usage, match=r"instruct@1 depend on it"):
            registry.remove("style@2")
        with pytest.raises(Usage, match=r"only depend on it"):
            registry.remove("style@3")
        with pytest.raises(Usage, match=r"instruct@1, style@1, style@2, style@3 depend on it"):
            registry.remove_base("tiny")
    registry.remove("style@1")
    assert registry.find_digest(made[0].digest) is None
    assert registry.resolve(made[0].digest).text == "style@1", "removed, and its weights are still there"


def test_what_reads_every_entry_says_how_far_it_is(tmp_path, later):
    registry = make_registry(tmp_path / "registry")
    shares = []
    registry.show_reading = lambda: contextlib.nullcontext(shares.append)
    registry.free()
    assert shares == []
    for name in ("one", "two"):
        register(registry, name)
    registry.free()
    assert shares == [0.5, 1.0]
    shares.clear()
    registry.find_digest("sha256:none")
    assert shares == [0.0, 0.5, 1.0]


def test_verify_reads_what_many_stand_on_once(tmp_path, monkeypatch):
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    for number in range(20):
        register(registry, "instruct", ["style@1"], seed=number)
    read, opened = registry._read, []
    monkeypatch.setattr(registry, "_read", lambda kind, name: opened.append(name) or read(kind, name))
    assert registry.verify()[1] == []
    assert len(opened) <= 6, opened


def _write_and_look(root, name, rounds, cache, failures):
    os.environ["STACKCTL_CACHE"] = cache
    index._WORTH_KEEPING = 1
    index.time = SimpleNamespace(time=lambda: time.time() + 10)
    registry = Registry(root)
    for number in range(1, rounds + 1):
        register(registry, name, seed=number)
        own = next(row for row in registry.adapter_rows() if row.name == name)
        if [v.version for v in own.versions] != list(range(1, number + 1)):
            failures.put(f"{name}: wrote {number} versions and sees {[v.version for v in own.versions]}")


def test_who_wrote_an_entry_sees_it_whoever_else_writes(tmp_path, later):
    registry = make_registry(tmp_path / "registry")
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    cache = str(tmp_path / "cache")
    names = ("one", "two", "three")
    writers = [
        context.Process(target=_write_and_look, args=(registry.root, name, 8, cache, failures)) for name in names
    ]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert list(registry.adapter_rows()) == direct(registry)
    assert {row.name: len(row.versions) for row in registry.adapter_rows()} == dict.fromkeys(names, 8)
