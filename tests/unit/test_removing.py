"""rm takes things out, gc frees what nobody needs: numbers are never given twice, and nothing that is needed goes."""

import errno
import os
import shutil

import msgspec
import pytest
from checkpoints import labels, make_base, make_registry, register, register_three

from stackctl.core.errors import NotFound, Usage
from stackctl.core.schema import Adapter, GivenNumber, Member, Removed, Stack
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.garbage_collection import free_weights
from stackctl.registry.planning import read_plan
from stackctl.registry.remove import remove_entry
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.stacks import save_stack
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry
from stackctl.registry.versions import add_version, next_number
from stackctl.storage import atomic, files


@pytest.fixture
def registry(tmp_path):
    registry = make_registry(tmp_path / "registry", make_base())
    register_three(registry)
    return registry


def freed(registry, **options):
    return {found.what: found.why for found in free_weights(registry, **options)}


def weights(registry):
    return sorted(str(p.relative_to(registry.root / "weights")) for p in (registry.root / "weights").glob("*/*"))


def test_a_removed_version_is_out_of_sight_and_its_weights_stay(registry):
    size = files.tree_bytes(registry.root / "weights" / "style" / "2")
    assert size > 1000
    assert remove_entry(registry, "style@2", dry_run=True).bytes == size
    assert registry.find_adapter("style").newest().version == 2
    digest = registry.find_adapter("style").newest().digest
    assert remove_entry(registry, "style@2").bytes == size
    assert [v.version for v in registry.find_adapter("style").versions] == [1]
    assert verify_registry(registry) == (3, [])
    assert weights(registry) == ["instruct/1", "style/1", "style/2"]
    with pytest.raises(NotFound) as caught:
        resolve_expression(registry, "style@2")
    assert "was removed" in caught.value.message
    assert str(registry.root / "weights" / "style" / "2") in caught.value.hint
    for text in (digest, digest[:24]):
        resolved = resolve_expression(registry, text)
        assert labels(resolved) == ["style@2"]
        assert read_plan(registry, resolved).check().rank == 2
        check_digests(registry, resolved.members)
    with pytest.raises(NotFound):
        save_stack(registry, "s", resolve_expression(registry, digest))
    assert freed(registry) == {"style@2": "removed"}
    assert weights(registry) == ["instruct/1", "style/1"]
    with pytest.raises(NotFound):
        resolve_expression(registry, digest)


def test_an_adapter_that_is_gone_altogether_is_found_by_its_digest(registry):
    digest = registry.find_adapter("instruct").newest().digest
    remove_entry(registry, "instruct")
    assert registry.names(Adapter) == ["style"]
    assert labels(resolve_expression(registry, digest)) == ["instruct@1"]
    with pytest.raises(NotFound):
        resolve_expression(registry, "instruct")


def test_digests_that_are_not_here_or_not_clear(registry):
    with pytest.raises(NotFound):
        resolve_expression(registry, "sha256:" + "0" * 64)
    adapter = registry.find_adapter("style")
    versions = [msgspec.structs.replace(v, digest=f"sha256:{'a' * 60}000{v.version}") for v in adapter.versions]
    registry.write(msgspec.structs.replace(adapter, versions=versions))
    with pytest.raises(Usage):
        resolve_expression(registry, "sha256:" + "a" * 12)
    assert labels(resolve_expression(registry, f"sha256:{'a' * 60}0002")) == ["style@2"]


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("going", ["style@2", "style"])
def test_a_number_is_never_given_twice(registry, going, collect):
    if going == "style":
        remove_entry(registry, "instruct")
    remove_entry(registry, going)
    if collect:
        free_weights(registry)
    assert register(registry, "style", seed=9).version == 3
    assert remove_entry(registry, "style@3").removed == ("style@3",)
    assert register(registry, "style", seed=9).version == 4
    assert verify_registry(registry)[1] == []


def test_the_next_number_is_known_in_advance(registry):
    """Trackers write into a folder of that name while it is trained."""
    remove_entry(registry, "style@2")
    for name in ("style", "fresh"):
        expected = next_number(registry, name)
        assert register(registry, name, seed=9).version == expected


def test_a_number_comes_back_for_the_bytes_that_it_was_given_to(registry):
    """A pull brings the number that a version has elsewhere."""
    known = registry.find_adapter("style").newest()
    remove_entry(registry, "style@2")

    def pulled(digest):
        def build(number):
            return msgspec.structs.replace(known, version=number, digest=digest)

        return add_version(registry, "style", build, None, given=GivenNumber(version=2, digest=digest)).version

    assert pulled("sha256:another") == 3
    assert pulled(known.digest) == 2
    assert registry.find_removed("style").versions == []
    assert [v.version for v in registry.find_adapter("style").versions] == [1, 2, 3]


def test_what_a_new_version_stands_on_comes_back(registry):
    """It was trained for weeks, and meanwhile somebody removed what lies under it."""
    remove_entry(registry, "style@2")
    register(registry, "poem", ["style@2:0.5"], seed=5)
    assert resolve_expression(registry, "style").pinned == "style@2"
    assert registry.find_removed("style").versions == []
    assert verify_registry(registry)[1] == []
    assert freed(registry) == {}


def test_what_a_stack_pins_is_kept_though_it_was_removed(registry):
    """A stack may come back by a merge, or by hand."""
    version = registry.find_adapter("style").newest()
    remove_entry(registry, "style@2")
    member = Member(adapter="style", version=2, digest=version.digest)
    stack = Stack(name="merged", base="tiny", fingerprint=version.fingerprint, members=[member], created="x")
    registry.write(stack)
    assert labels(resolve_expression(registry, "merged")) == ["style@2"]
    assert verify_registry(registry)[1] == []
    assert freed(registry) == {}
    remove_entry(registry, "merged")
    assert freed(registry) == {"style@2": "removed"}


def test_what_unfinished_training_stands_on_is_kept(registry):
    remove_entry(registry, "style@2")
    assert freed(registry, needed={"style@2"}) == {}
    assert freed(registry) == {"style@2": "removed"}


def test_gc_frees_what_was_never_registered_and_left_behind(registry):
    shutil.copytree(registry.root / "weights" / "style" / "1", registry.root / "weights" / "style" / "9")
    shutil.copytree(registry.root / "weights" / "style", registry.root / "weights" / "ghost")
    left = [
        registry.root / "weights" / "style" / (atomic._own_prefix() + "x") / (atomic._own_prefix() + "y"),
        registry.root / "runs" / "r" / (atomic._own_prefix() + "z"),
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x" * 7)
    (registry.root / "weights" / "README").write_text("mine")
    (registry.root / "weights" / "style" / "mine").mkdir()
    (registry.root / "weights" / "style" / "notes.txt").write_text("mine")
    before = sorted(registry.root.rglob("*"))
    would = free_weights(registry, dry_run=True)
    assert sorted(registry.root.rglob("*")) == before
    assert free_weights(registry) == would
    assert {found.what for found in would} == {
        "style@9", "ghost@1", "ghost@2", "ghost@9",
        os.path.relpath(left[0].parent, registry.root), os.path.relpath(left[1], registry.root),
    }  # fmt: skip
    assert [found.bytes for found in would if found.why == "left by a killed process"] == [7, 7]
    assert weights(registry) == ["instruct/1", "style/1", "style/2", "style/mine", "style/notes.txt"]
    assert (registry.root / "weights" / "README").is_file()
    assert verify_registry(registry) == (4, [])
    assert freed(registry) == {}


def test_gc_keeps_what_another_entry_links_to(registry):
    version = registry.find_adapter("style").newest()
    for name, path in (("linked", "weights/style/2"), ("above", "weights/style/1/.."), ("abroad", "weights/ghost/1/x")):
        add_version(registry, name, lambda n, p=path: msgspec.structs.replace(version, version=n, path=p), None)
    (registry.root / "weights" / "ghost" / "1" / "x").mkdir(parents=True)
    remove_entry(registry, "style@2")
    assert freed(registry) == {}
    assert weights(registry) == ["ghost/1", "instruct/1", "style/1", "style/2"]
    remove_entry(registry, "linked")
    remove_entry(registry, "abroad")
    free_weights(registry)
    assert weights(registry) == ["instruct/1", "style/1"]


def test_gc_never_follows_a_link_out(registry, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(registry.root / "weights" / "style" / "1", outside)
    version = registry.find_adapter("style").newest()
    add_version(registry, "far", lambda n: msgspec.structs.replace(version, version=n, path=str(outside)), None)
    (registry.root / "weights" / "style" / "7").symlink_to(outside)
    assert remove_entry(registry, "far").bytes == 0
    free_weights(registry)
    assert sorted(p.name for p in outside.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_gc_frees_nothing_behind_a_link_that_a_clone_brought(registry, tmp_path):
    """A registry comes by git, and so do links in it."""
    precious = tmp_path / "home" / "letters" / "2024"
    precious.mkdir(parents=True)
    (registry.root / "weights" / "letters").symlink_to(precious.parent)
    free_weights(registry)
    assert precious.is_dir()
    (registry.root / "weights" / "letters").unlink()
    larger_disk = tmp_path / "home"
    for path in (registry.root / "weights").iterdir():
        path.rename(larger_disk / path.name)
    (registry.root / "weights").rmdir()
    (registry.root / "weights").symlink_to(larger_disk)
    remove_entry(registry, "style@2")
    free_weights(registry)
    assert precious.is_dir()
    assert weights(registry) == ["instruct/1", "letters/2024", "style/1"]


def test_gc_frees_nothing_while_an_entry_cannot_be_read(registry):
    remove_entry(registry, "style@2")
    registry.entry_path(Stack, "torn").write_text("schema: 1\nname: [")
    with pytest.raises(Usage):
        free_weights(registry)
    assert weights(registry) == ["instruct/1", "style/1", "style/2"]


def test_gc_frees_space_where_there_is_none_for_an_entry(registry, monkeypatch):
    remove_entry(registry, "style@2")
    claim = atomic.tempfile.mkstemp

    def full(prefix, dir):
        if (registry.root / "weights" / "style" / "2").exists():
            raise OSError(errno.ENOSPC, "No space left on device", str(dir))
        return claim(prefix=prefix, dir=dir)

    monkeypatch.setattr(atomic.tempfile, "mkstemp", full)
    assert freed(registry) == {"style@2": "removed"}
    assert weights(registry) == ["instruct/1", "style/1"]
    assert registry.find_removed("style").versions == [] and verify_registry(registry)[1] == []
    assert freed(registry) == {}


def test_a_version_that_a_kill_left_in_both_places_is_registered(registry):
    """rm writes what was removed first, and the entry last."""
    version = registry.find_adapter("style").newest()
    gone = registry.find_removed("style")
    registry.write(msgspec.structs.replace(gone, versions=[version]))
    assert resolve_expression(registry, "style").pinned == "style@2"
    assert freed(registry) == {}
    assert weights(registry) == ["instruct/1", "style/1", "style/2"]
    assert remove_entry(registry, "style@2").removed == ("style@2",)
    assert [v.version for v in registry.find_removed("style").versions] == [2]


def test_an_old_registry_has_nothing_removed(registry):
    (registry.root / "removed").rmdir()
    assert Registry(registry.root).find_removed("style") == Removed(name="style", given=[])
    assert freed(registry) == {}
    remove_entry(registry, "style@2")
    assert (registry.root / "removed" / "style.yaml").is_file()


def test_what_cannot_be_removed_names_what_to_begin_with(registry):
    """Following the hints from one refusal to the next takes everything out."""
    save_stack(registry, "both", resolve_expression(registry, "style@1+instruct"))
    asked, removed = ["style@1"], []
    while asked:
        try:
            removed += remove_entry(registry, asked[-1]).removed
            asked.pop()
        except Usage as error:
            asked.append(error.hint.rpartition("stackctl rm ")[2])
            assert len(asked) < 5
    assert removed == ["both", "instruct@1", "style@1"]


def test_weights_that_a_stack_or_an_adapter_needs_stay_while_their_entry_is_gone(registry):
    """Deleted by mistake, or not checked out: git has it, and has no weights."""
    save_stack(registry, "both", resolve_expression(registry, "style@2+instruct"))
    entry = registry.entry_path(Adapter, "style")
    kept = entry.read_bytes()
    entry.unlink()
    assert freed(registry) == {}
    entry.write_bytes(kept)
    assert verify_registry(registry)[1] == []
    remove_entry(registry, "both")
    entry.unlink()
    assert freed(registry) == {"style@2": "never registered"}  # instruct stands on style@1
