"""verify: what is hashed, and how far it says that it is."""

from __future__ import annotations

import os
import pty
import select

import msgspec
import pytest
from checkpoints import hub_base, make_registry, register_three

from stackctl.registry.adapters import with_versions
from stackctl.registry.verify import bytes_to_verify, verify_registry


@pytest.fixture
def registry(tmp_path):
    registry = make_registry(tmp_path / "registry", hub_base())
    register_three(registry)
    return registry


def weights(registry, label):
    name, _, number = label.partition("@")
    return registry.root / "weights" / name / number / "adapter_model.safetensors"


def test_every_byte_that_is_hashed_is_counted(registry):
    read, whole = [], [weights(registry, label).stat().st_size for label in ("instruct@1", "style@1", "style@2")]
    assert verify_registry(registry, read=read.append) == (4, [])
    assert read == whole
    tensors = sum(version.bytes for name in ("instruct", "style") for version in registry.find_adapter(name).versions)
    assert bytes_to_verify(registry) == tensors
    assert 0 < tensors < sum(whole), "a header is not counted in entries"


@pytest.mark.parametrize("terms", [["style@1"], ["instruct@1"]])
def test_a_version_that_stands_on_itself_is_named(registry, terms):
    style = registry.find_adapter("style")
    registry.write(with_versions(style, msgspec.structs.replace(style.versions[0], trained_on=terms)))
    _, problems = verify_registry(registry)
    assert {problem["what"] for problem in problems} >= {"style@1"}
    assert all("trained on itself" in problem["message"] for problem in problems)


def test_the_sum_is_known_where_an_entry_cannot_be_read(registry):
    instruct = registry.find_adapter("instruct").newest().bytes
    (registry.root / "adapters" / "style.yaml").write_text("broken")
    assert bytes_to_verify(registry) == instruct


def test_large_files_are_counted_piece_by_piece(registry, monkeypatch):
    monkeypatch.setattr("stackctl.storage.hashes._CHUNK", 100)
    size, read = weights(registry, "style@1").stat().st_size, []
    verify_registry(registry, {"style@1"}, read=read.append)
    assert sum(read) == size
    assert read[:2] == [100, 100]


def test_a_terminal_shows_how_much_of_how_much(registry, run, monkeypatch, tmp_path):
    """The bar is drawn on a pseudo-terminal; what verify found goes to stdout as ever."""
    monkeypatch.setenv("STACKCTL_REGISTRY", str(registry.root))
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as screen:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("sys.stderr", screen)
        ran = run("verify")
        screen.flush()
        shown = b""
        while select.select([ours], [], [], 0)[0]:  # a terminal gives a few kilobytes at a time
            shown += os.read(ours, 100_000)
    os.close(ours)
    assert ran.out == "4 entries checked, nothing wrong\n"
    assert b"verifying style@2" in shown
    assert b"kB" in shown or b"bytes" in shown
    assert b"/s" in shown
