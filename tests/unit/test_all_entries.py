"""Questions about all entries: each is answered by the files, however many writers there are."""

from __future__ import annotations

import contextlib
import multiprocessing

import pytest
from checkpoints import make_registry, register

from stackctl.core.errors import Usage
from stackctl.core.schema import Adapter
from stackctl.registry.adapters import find_digest
from stackctl.registry.base_entries import remove_base
from stackctl.registry.garbage_collection import free_weights
from stackctl.registry.remove import remove_entry
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.stacks import save_stack
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry


def test_what_is_no_entry_is_not_listed(tmp_path):
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    folder = registry.root / "adapters"
    (folder / ".tmp-x.yaml").write_text("unfinished")
    (folder / "notes.txt").write_text("mine")
    (folder / "gone.yaml").symlink_to(folder / "nowhere")
    assert [adapter.name for adapter in registry.adapters()] == ["style"]
    assert [adapter.name for adapter in registry.adapters(mentioning="e")] == ["style"]
    (tmp_path / "elsewhere.yaml").write_text((folder / "style.yaml").read_text().replace("name: style", "name: afar"))
    (folder / "gone.yaml").unlink()
    (folder / "afar.yaml").symlink_to(tmp_path / "elsewhere.yaml")
    assert [adapter.name for adapter in registry.adapters()] == ["afar", "style"]


def test_questions_about_all_entries(tmp_path):
    registry = make_registry(tmp_path / "registry")
    made = [register(registry, "style", seed=number) for number in range(3)]
    register(registry, "instruct", ["style@2:0.5"], seed=9)
    save_stack(registry, "only", resolve_expression(registry, "style@3"))
    assert str(find_digest(registry, made[1].digest)) == "style@2"
    assert resolve_expression(registry, made[1].digest[:20]).text == "style@2"
    with pytest.raises(Usage, match=r"depends on it: instruct@1"):
        remove_entry(registry, "style@2")
    with pytest.raises(Usage, match=r"depends on it: only"):
        remove_entry(registry, "style@3")
    with pytest.raises(Usage, match=r"depends on it: instruct@1, style@1, style@2, style@3"):
        remove_base(registry, "tiny")
    remove_entry(registry, "style@1")
    assert find_digest(registry, made[0].digest) is None
    assert resolve_expression(registry, made[0].digest).text == "style@1", "removed, and its weights are still there"


@pytest.mark.parametrize(
    ("plain", "written"),
    [("- style@1", r'- "st\u0079le@1"'), ("- style@1", '- "st\\\n      yle@1"'), ("- style@1", "- 'style@1'")],
)
def test_an_entry_that_was_edited_by_hand_still_holds_what_it_stands_on(tmp_path, plain, written):
    """Which files need parsing is told by their text, and YAML can write a name in more than one way."""
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    register(registry, "instruct", ["style@1"])
    path = registry.entry_path(Adapter, "instruct")
    text = path.read_text()
    assert plain in text
    path.write_text(text.replace(plain, written))
    assert registry.find_adapter("instruct").newest().trained_on == ["style@1"]
    with pytest.raises(Usage, match=r"depends on it: instruct@1"):
        remove_entry(registry, "style@1")


def test_a_digest_is_found_however_it_is_written(tmp_path):
    registry = make_registry(tmp_path / "registry")
    digest = register(registry, "style").digest
    register(registry, "other", seed=4)
    path = registry.entry_path(Adapter, "style")
    path.write_text(path.read_text().replace(f"digest: {digest}", f'digest: "sha\\x32{digest[4:]}"'))
    assert str(find_digest(registry, digest)) == "style@1"
    assert find_digest(registry, digest[:-1]) is None


def test_what_reads_every_entry_says_how_far_it_is(tmp_path):
    registry = make_registry(tmp_path / "registry")
    shares = []
    registry.show_reading = lambda: contextlib.nullcontext(shares.append)
    free_weights(registry)
    assert shares == []
    for name in ("one", "two"):
        register(registry, name)
    free_weights(registry)
    assert shares == [0.5, 1.0]
    shares.clear()
    assert find_digest(registry, "sha256:none") is None
    assert shares == [0.5, 1.0]


def test_verify_reads_what_many_stand_on_once(tmp_path, monkeypatch):
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    for number in range(20):
        register(registry, "instruct", ["style@1"], seed=number)
    read, opened = registry.read, []
    monkeypatch.setattr(registry, "read", lambda kind, name: opened.append(name) or read(kind, name))
    assert verify_registry(registry)[1] == []
    assert len(opened) <= 6, opened


def _write_and_look(root, name, rounds, failures):
    registry = Registry(root)
    for number in range(1, rounds + 1):
        register(registry, name, seed=number)
        own = next(adapter for adapter in registry.adapters() if adapter.name == name)
        if [v.version for v in own.versions] != list(range(1, number + 1)):
            failures.put(f"{name}: wrote {number} versions and sees {[v.version for v in own.versions]}")


def test_who_wrote_an_entry_sees_it_whoever_else_writes(tmp_path):
    registry = make_registry(tmp_path / "registry")
    context = multiprocessing.get_context("fork")
    failures = context.SimpleQueue()
    names = ("one", "two", "three")
    writers = [context.Process(target=_write_and_look, args=(registry.root, name, 8, failures)) for name in names]
    for process in writers:
        process.start()
    for process in writers:
        process.join(60)
        assert process.exitcode == 0
    assert failures.empty(), failures.get()
    assert {adapter.name: len(adapter.versions) for adapter in registry.adapters()} == dict.fromkeys(names, 8)
