"""Files that are missing or changed come back by their digest, and nothing that is whole is touched."""

import multiprocessing
import os
import shutil

import msgspec
import pytest
from checkpoints import flip, lora_config, make_base, make_registry, register, register_three, write_checkpoint

from stackctl.core.errors import NotFound, VerificationFailed
from stackctl.core.expressions import Reference
from stackctl.core.schema import Adapter
from stackctl.hub.repair import find_sources, repair
from stackctl.registry.adapters import resolve_adapter
from stackctl.registry.checkpoint_files import damaged_members, folder_digest
from stackctl.registry.garbage_collection import free_weights
from stackctl.registry.remove import remove_entry
from stackctl.registry.restore import restore_files
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry
from stackctl.registry.versions import add_version
from stackctl.storage.atomic import staging_directory

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def registry(tmp_path):
    registry = make_registry(tmp_path / "registry", make_base())
    register_three(registry)
    (weights(registry) / "tokenizer.json").write_text("mine")
    return registry


@pytest.fixture
def backup(registry, tmp_path):
    """A copy of everything below weights/, from when all was well."""
    return shutil.copytree(registry.root / "weights", tmp_path / "backup")


def weights(registry, label="style@2"):
    return registry.root / "weights" / label.replace("@", "/")


def member(registry, label="style@2"):
    name, _, number = label.partition("@")
    return resolve_adapter(registry, Reference(name, int(number)))


def everything(root):
    return {p: (p.read_bytes(), p.stat().st_ino) for p in root.rglob("*") if p.is_file() and p.name[0] != "."}


def mend(registry, folder=None, label="style@2"):
    found = member(registry, label)
    sources = find_sources(registry, [found], folder)[label]
    return repair(registry, found, sources, lambda _: None, progress=False)


def lose(registry):
    shutil.rmtree(weights(registry))


def lose_the_weights(registry):
    (weights(registry) / WEIGHTS).unlink()


def lose_the_configuration(registry):
    (weights(registry) / CONFIG).unlink()


def change_the_weights(registry):
    flip(weights(registry) / WEIGHTS)


def cut_the_weights(registry):
    os.truncate(weights(registry) / WEIGHTS, 100)


def change_the_configuration(registry):
    (weights(registry) / CONFIG).write_text(str(lora_config(lora_alpha=8)))


def change_both(registry):
    change_the_weights(registry)
    change_the_configuration(registry)


@pytest.mark.parametrize(
    "damage",
    [
        lose, lose_the_weights, lose_the_configuration, change_the_weights, cut_the_weights, change_the_configuration,
        change_both,
    ],
    ids=lambda function: function.__name__,
)  # fmt: skip
def test_only_what_is_damaged_is_replaced(registry, backup, damage):
    before = everything(registry.root)
    damage(registry)
    assert [p["what"] for p in verify_registry(registry)[1]] == ["style@2"]
    broken = everything(registry.root)
    assert mend(registry, backup).place == str(backup / "style" / "2")
    assert verify_registry(registry) == (4, [])
    after = everything(registry.root)
    assert {path: content for path, (content, _) in after.items()} == {p: c for p, (c, _) in before.items()}
    for path, (content, inode) in broken.items():
        if before[path][0] == content:
            assert after[path][1] == inode, f"{path} was whole, and was written again"


def test_a_folder_that_is_not_clean_is_no_source(registry, backup):
    lose(registry)
    flip(backup / "style" / "2" / WEIGHTS)
    assert find_sources(registry, [member(registry)], backup)["style@2"] == []
    with pytest.raises(NotFound) as caught:
        mend(registry, backup)
    assert "no copy" in caught.value.message
    assert not weights(registry).exists()


def test_what_has_another_digest_never_gets_into_place(registry, backup):
    """However it came into the staging folder."""
    change_the_weights(registry)
    broken = everything(registry.root)
    for source in (backup / "style" / "1", backup / "instruct" / "1"):
        with staging_directory(registry.root / "weights") as staged:
            shutil.copytree(source, staged, dirs_exist_ok=True)
            with pytest.raises(VerificationFailed):
                restore_files(registry, member(registry), staged)
    assert everything(registry.root) == broken


def test_the_configuration_alone_is_enough_where_the_weights_are_right(registry, backup):
    change_the_configuration(registry)
    with staging_directory(registry.root / "weights") as staged:
        shutil.copy(backup / "style" / "2" / CONFIG, staged)
        restore_files(registry, member(registry), staged)
    assert verify_registry(registry) == (4, [])


@pytest.mark.parametrize("where", ["another entry", "a removed one", "one without an entry"])
def test_the_registry_itself_is_looked_through(registry, where):
    twin = register(registry, "twin", seed=2)
    assert twin.digest == member(registry).version.digest
    (weights(registry, "twin@1") / "adapter_info.json").write_text('{"adapter": "twin"}')
    if where == "a removed one":
        remove_entry(registry, "twin")
    if where == "one without an entry":
        registry.entry_path(Adapter, "twin").unlink()
    lose(registry)
    assert mend(registry).kind == "registry"
    assert folder_digest(weights(registry)) == twin.digest
    assert not (weights(registry) / "adapter_info.json").exists(), "it tells of the twin"
    flip(weights(registry, "twin@1") / WEIGHTS)
    lose(registry)
    assert find_sources(registry, [member(registry)])["style@2"] == [], "a damaged twin is none"


def test_a_link_whose_files_are_gone_becomes_the_registrys_own(registry, backup, tmp_path):
    version = member(registry).version
    outside = shutil.copytree(weights(registry), tmp_path / "outside")
    linked = add_version(
        registry, "far", lambda n: msgspec.structs.replace(version, version=n, path=str(outside)), None
    )
    flip(outside / WEIGHTS)
    theirs = everything(outside)
    assert mend(registry, backup, "far@1").kind == "folder"
    assert everything(outside) == theirs, "somebody else's folder was written to"
    now = member(registry, "far@1").version
    assert now == msgspec.structs.replace(linked, path="weights/far/1")
    assert verify_registry(registry) == (5, [])


def test_what_was_removed_meanwhile_is_not_brought_back(registry, backup):
    lose(registry)
    found = member(registry)
    sources = find_sources(registry, [found], backup)["style@2"]
    remove_entry(registry, "style@2")
    with pytest.raises(VerificationFailed, match="removed"):
        repair(registry, found, sources, lambda _: None, progress=False)
    assert not weights(registry).exists()


def test_a_source_that_goes_away_is_passed_over(registry, backup, tmp_path):
    lose(registry)
    second = shutil.copytree(backup, tmp_path / "second")
    sources = [
        source
        for folder in (backup, second)
        for source in find_sources(registry, [member(registry)], folder)["style@2"]
    ]
    shutil.rmtree(backup)
    assert repair(registry, member(registry), sources, lambda _: None, progress=False).place.startswith(str(second))
    assert not list(registry.root.rglob(".tmp-*"))


def test_somebody_who_was_quicker_is_not_disturbed(registry, backup):
    lose(registry)
    found = member(registry)
    mend(registry, backup)
    whole = everything(registry.root)
    repair(registry, found, find_sources(registry, [found], backup)["style@2"], lambda _: None, progress=False)
    assert everything(registry.root) == whole


def test_an_entry_that_cannot_be_read_does_not_stop_the_others(registry, backup):
    register(registry, "twin", seed=2)
    registry.entry_path(Adapter, "instruct").write_text("schema: 1\nname: [")
    lose(registry)
    assert mend(registry).kind == "registry"
    assert [p["what"] for p in verify_registry(registry)[1]] == ["instruct"]


def test_a_configuration_that_stackctl_cannot_use_is_still_known_by_its_digest(tmp_path):
    """A digest says whether bytes are the same, not what they are good for."""
    folder = write_checkpoint(tmp_path / "odd", {"peft_type": "LORA", "r": "no number"})
    assert folder_digest(folder) is not None
    (folder / CONFIG).write_text("{")
    assert folder_digest(folder) is None
    assert folder_digest(tmp_path) is None


def _mend_and_more(root, backup, worker, barrier):
    """One repairs, one frees, one adds and removes; all of them at once, and again and again."""
    registry = Registry(root)
    barrier.wait()
    for turn in range(6):
        if worker == "free":
            free_weights(registry)
        elif worker == "add":
            register(registry, "more", ["style@2"], seed=50 + turn)
            remove_entry(registry, "more")
        else:
            damaged = damaged_members(registry, [member(registry, label) for label in LABELS])
            for found in damaged:
                repair(registry, found, find_sources(registry, [found], backup)[found.label], print, progress=False)


LABELS = ("style@1", "style@2", "instruct@1")


def test_several_may_repair_while_others_add_remove_and_free(registry, backup):
    context = multiprocessing.get_context("fork")
    for damage in (lose, change_both):
        damage(registry)
        flip(weights(registry, "instruct@1") / WEIGHTS)
        workers = ("mend", "mend", "mend", "free", "add")
        barrier = context.Barrier(len(workers))
        running = [
            context.Process(target=_mend_and_more, args=(registry.root, backup, worker, barrier)) for worker in workers
        ]
        for process in running:
            process.start()
        for process in running:
            process.join(60)
        assert [process.exitcode for process in running] == [0] * len(workers)
        free_weights(registry)
        assert verify_registry(registry) == (4, [])
        assert not list(registry.root.rglob(".tmp-*"))
