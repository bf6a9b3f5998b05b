"""rm takes things out, gc frees what nobody needs: numbers are never given twice, and nothing that is needed goes."""

import os
import shutil

import msgspec
import pytest
from checkpoints import make_base, make_registry, register, register_three

from stackctl.core.errors import NotFound, Usage
from stackctl.core.schema import Adapter, Member, Removed, Stack
from stackctl.registry import Registry
from stackctl.storage import files

pytestmark = pytest.mark.usefixtures("no_power_cuts")


@pytest.fixture
def registry(tmp_path):
    registry = make_registry(tmp_path / "registry", make_base())
    register_three(registry)
    return registry


def freed(registry, **options):
    return {found.what: found.why for found in registry.free(**options)}


def weights(registry):
    return sorted(str(p.relative_to(registry.root / "weights")) for p in (registry.root / "weights").glob("*/*"))


def labels(stack):
    return [str(member) for member in stack.members]


def test_a_removed_version_is_out_of_sight_and_its_weights_stay(registry):
    size = files.tree_bytes(registry.root / "weights" / "style" / "2")
    assert size > 1000
    assert registry.remove("style@2", dry_run=True).bytes == size
    assert registry.find_adapter("style").newest().version == 2
    digest = registry.find_adapter("style").newest().digest
    assert registry.remove("style@2").bytes == size
    assert [v.version for v in registry.find_adapter("style").versions] == [1]
    assert registry.verify() == (3, [])
    assert weights(registry) == ["instruct/1", "style/1", "style/2"]
    with pytest.raises(NotFound) as caught:
        registry.resolve("style@2")
    assert "was removed" in caught.value.message
    assert str(registry.root / "weights" / "style" / "2") in caught.value.hint
    for text in (digest, digest[:24]):
        resolved = registry.resolve(text)
        assert labels(resolved) == ["style@2"]
        assert registry.plan(resolved).check().rank == 2
        registry.check_digests(resolved.members)
    with pytest.raises(NotFound):
        registry.save_stack("s", registry.resolve(digest))
    assert freed(registry) == {"style@2": "removed"}
    assert weights(registry) == ["instruct/1", "style/1"]
    with pytest.raises(NotFound):
        registry.resolve(digest)


def test_an_adapter_that_is_gone_altogether_is_found_by_its_digest(registry):
    digest = registry.find_adapter("instruct").newest().digest
    registry.remove("instruct")
    assert registry.names(Adapter) == ["style"]
    assert labels(registry.resolve(digest)) == ["instruct@1"]
    with pytest.raises(NotFound):
        registry.resolve("instruct")


def test_digests_that_are_not_here_or_not_clear(registry):
    with pytest.raises(NotFound):
        registry.resolve("sha256:" + "0" * 64)
    adapter = registry.find_adapter("style")
    versions = [msgspec.structs.replace(v, digest=f"sha256:{'a' * 60}000{v.version}") for v in adapter.versions]
    registry._write(msgspec.structs.replace(adapter, versions=versions))
    with pytest.raises(Usage):
        registry.resolve("sha256:" + "a" * 12)
    assert labels(registry.resolve(f"sha256:{'a' * 60}0002")) == ["style@2"]


@pytest.mark.parametrize("collect", [False, True])
@pytest.mark.parametrize("going", ["style@2", "style"])
def test_a_number_is_never_given_twice(registry, going, collect):
    if going == "style":
        registry.remove("instruct")
    registry.remove(going)
    if collect:
        registry.free()
    assert register(registry, "style", seed=9).version == 3
    assert registry.remove("style@3").removed == ("style@3",)
    assert register(registry, "style", seed=9).version == 4
    assert registry.verify()[1] == []


def test_the_next_number_is_known_in_advance(registry):
    """Trackers write into a folder of that name while it is trained."""
    registry.remove("style@2")
    for name in ("style", "fresh"):
        expected = registry.next_number(name)
        assert register(registry, name, seed=9).version == expected


def test_a_number_comes_back_for_the_bytes_that_it_was_given_to(registry):
    """A pull brings the number that a version has elsewhere."""
    known = registry.find_adapter("style").newest()
    registry.remove("style@2")

    def pulled(digest):
        def build(number):
            return msgspec.structs.replace(known, version=number, digest=digest)

        return registry.add_version("style", build, None, number=2, digest=digest).version

    assert pulled("sha256:another") == 3
    assert pulled(known.digest) == 2
    assert registry.find_removed("style").versions == []
    assert [v.version for v in registry.find_adapter("style").versions] == [1, 2, 3]


def test_what_a_new_version_stands_on_comes_back(registry):
    """It was trained for weeks, and meanwhile somebody removed what lies under it."""
    registry.remove("style@2")
    register(registry, "poem", ["style@2:0.5"], seed=5)
    assert registry.resolve("style").pinned == "style@2"
    assert registry.find_removed("style").versions == []
    assert registry.verify()[1] == []
    assert freed(registry) == {}


def test_what_a_stack_pins_is_kept_though_it_was_removed(registry):
    """A stack may come back by a merge, or by hand."""
    version = registry.find_adapter("style").newest()
    registry.remove("style@2")
    member = Member(adapter="style", version=2, digest=version.digest)
    stack = Stack(name="merged", base="tiny", fingerprint=version.fingerprint, members=[member], created="x")
    registry._write(stack)
    assert labels(registry.resolve("merged")) == ["style@2"]
    assert registry.verify()[1] == []
    assert freed(registry) == {}
    registry.remove("merged")
    assert freed(registry) == {"style@2": "removed"}


def test_what_unfinished_training_stands_on_is_kept(registry):
    registry.remove("style@2")
    assert freed(registry, needed={"style@2"}) == {}
    assert freed(registry) == {"style@2": "removed"}


def test_gc_frees_what_was_never_registered_and_left_behind(registry):
    shutil.copytree(registry.root / "weights" / "style" / "1", registry.root / "weights" / "style" / "9")
    shutil.copytree(registry.root / "weights" / "style", registry.root / "weights" / "ghost")
    left = [
        registry.root / "weights" / "style" / (files._own_prefix() + "x") / (files._own_prefix() + "y"),
        registry.root / "runs" / "r" / (files._own_prefix() + "z"),
    ]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x" * 7)
    (registry.root / "weights" / "README").write_text("mine")
    (registry.root / "weights" / "style" / "mine").mkdir()
    (registry.root / "weights" / "style" / "notes.txt").write_text("mine")
    before = sorted(registry.root.rglob("*"))
    would = [found.json() for found in registry.free(dry_run=True)]
    assert sorted(registry.root.rglob("*")) == before
    assert [found.json() for found in registry.free()] == would
    assert {found["what"] for found in would} == {
        "style@9", "ghost@1", "ghost@2", "ghost@9",
        os.path.relpath(left[0].parent, registry.root), os.path.relpath(left[1], registry.root),
    }  # fmt: skip
    assert [f["bytes"] for f in would if f["why"] == "left by a killed process"] == [7, 7]
    assert weights(registry) == ["instruct/1", "style/1", "style/2", "style/mine", "style/notes.txt"]
    assert (registry.root / "weights" / "README").is_file()
    assert registry.verify() == (4, [])
    assert freed(registry) == {}


def test_gc_keeps_what_another_entry_links_to(registry):
    version = registry.find_adapter("style").newest()
    for name, path in (("linked", "weights/style/2"), ("above", "weights/style/1/.."), ("abroad", "weights/ghost/1/x")):
        registry.add_version(name, lambda n, p=path: msgspec.structs.replace(version, version=n, path=p), None)
    (registry.root / "weights" / "ghost" / "1" / "x").mkdir(parents=True)
    registry.remove("style@2")
    assert freed(registry) == {}
    assert weights(registry) == ["ghost/1", "instruct/1", "style/1", "style/2"]
    registry.remove("linked")
    registry.remove("abroad")
    registry.free()
    assert weights(registry) == ["instruct/1", "style/1"]


def test_gc_never_follows_a_link_out(registry, tmp_path):
    outside = tmp_path / "outside"
    shutil.copytree(registry.root / "weights" / "style" / "1", outside)
    version = registry.find_adapter("style").newest()
    registry.add_version("far", lambda n: msgspec.structs.replace(version, version=n, path=str(outside)), None)
    (registry.root / "weights" / "style" / "7").symlink_to(outside)
    assert registry.remove("far").bytes == 0
    registry.free()
    assert sorted(p.name for p in outside.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_gc_frees_nothing_behind_a_link_that_a_clone_brought(registry, tmp_path):
    """A registry comes by git, and so do links in it."""
    precious = tmp_path / "home" / "letters" / "2024"
    precious.mkdir(parents=True)
    (registry.root / "weights" / "letters").symlink_to(precious.parent)
    registry.free()
    assert precious.is_dir()
    (registry.root / "weights" / "letters").unlink()
    larger_disk = tmp_path / "home"
    for path in (registry.root / "weights").iterdir():
        path.rename(larger_disk / path.name)
    (registry.root / "weights").rmdir()
    (registry.root / "weights").symlink_to(larger_disk)
    registry.remove("style@2")
    registry.free()
    assert precious.is_dir()
    assert weights(registry) == ["instruct/1", "letters/2024", "style/1"]


def test_gc_frees_nothing_while_an_entry_cannot_be_read(registry):
    registry.remove("style@2")
    registry._entry_path(Stack, "torn").write_text("schema: 1\nname: [")
    with pytest.raises(Usage):
        registry.free()
    assert weights(registry) == ["instruct/1", "style/1", "style/2"]


def test_a_version_that_a_kill_left_in_both_places_is_registered(registry):
    """rm writes what was removed first, and the entry last."""
    version = registry.find_adapter("style").newest()
    gone = registry.find_removed("style")
    registry._write(msgspec.structs.replace(gone, versions=[version]))
    assert registry.resolve("style").pinned == "style@2"
    assert freed(registry) == {}
    assert weights(registry) == ["instruct/1", "style/1", "style/2"]
    assert registry.remove("style@2").removed == ("style@2",)
    assert [v.version for v in registry.find_removed("style").versions] == [2]


def test_an_old_registry_has_nothing_removed(registry):
    (registry.root / "removed").rmdir()
    assert Registry(registry.root).find_removed("style") == Removed(name="style", given=[])
    assert freed(registry) == {}
    registry.remove("style@2")
    assert (registry.root / "removed" / "style.yaml").is_file()


def test_what_cannot_be_removed_names_what_to_begin_with(registry):
    """Following the hints from one refusal to the next takes everything out."""
    registry.save_stack("both", registry.resolve("style@1+instruct"))
    asked, removed = ["style@1"], []
    while asked:
        try:
            removed += registry.remove(asked[-1]).removed
            asked.pop()
        except Usage as error:
            asked.append(error.hint.rpartition("stackctl rm ")[2])
            assert len(asked) < 5
    assert removed == ["both", "instruct@1", "style@1"]
