"""Adding, saving and removing: nothing half there, nothing lost, whatever is killed and whoever else writes."""

import errno
import multiprocessing
import os

import msgspec
import pytest
from checkpoints import full_version, lora_config, make_base, make_registry, register, write_checkpoint

from stackctl.core.errors import Failed, Incompatible, NotFound, StackctlError, Usage
from stackctl.core.expressions import Reference
from stackctl.core.schema import Adapter, Base, Defaults, GivenNumber, RegistryFile, Stack
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.registry.adapters import resolve_adapter
from stackctl.registry.base_entries import remove_base, save_base
from stackctl.registry.planning import read_plan
from stackctl.registry.remove import remove_entry
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.stacks import save_stack, use_stack
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry
from stackctl.registry.versions import add_version
from stackctl.storage import atomic


def test_versions_count_up_and_keep_their_weights(registry):
    for number in (1, 2, 3):
        assert register(registry, "style", seed=number).version == number
    folders = sorted(p.name for p in (registry.root / "weights" / "style").iterdir())
    assert folders == ["1", "2", "3"]
    assert verify_registry(registry) == (4, [])


class Kill(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("moment", ["build", "publish", "entry"])
def test_a_kill_at_any_moment_leaves_the_registry_valid(registry, monkeypatch, moment):
    register(registry, "style", seed=1)
    before = registry.entry_path(Adapter, "style").read_bytes()

    def die(*_):
        raise Kill

    with monkeypatch.context() as patch:
        if moment == "publish":
            patch.setattr(atomic, "publish_directory", die)
        if moment == "entry":
            patch.setattr(atomic, "written_after", die)
        with pytest.raises(Kill):
            register(registry, "style", seed=2, before_entry=die if moment == "build" else lambda _: None)
    assert registry.entry_path(Adapter, "style").read_bytes() == before
    assert resolve_expression(registry, "style").pinned == "style@1"
    assert verify_registry(registry) == (2, [])
    again = register(registry, "style", seed=2)
    assert again.version == 2
    assert verify_registry(registry) == (3, [])
    assert not list(registry.root.rglob(".tmp-*"))


def test_weights_of_another_branch_are_kept_when_a_version_gets_their_number(registry):
    """Its entries are not checked out, and its weights are where they were: they were overwritten."""
    entry = registry.entry_path(Adapter, "style")
    register(registry, "style", seed=1)
    main = entry.read_bytes()
    there = register(registry, "style", seed=2)
    branch = entry.read_bytes()
    entry.write_bytes(main)
    here = register(registry, "style", seed=3)
    assert (there.version, here.version) == (2, 3)
    assert verify_registry(registry) == (3, [])
    entry.write_bytes(branch)
    assert verify_registry(registry) == (3, [])


def test_a_first_version_that_was_killed_does_not_exist(registry, monkeypatch):
    def die(*_):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "written_after", die)
        with pytest.raises(Kill):
            register(registry, "style")
    assert registry.names(Adapter) == []
    with pytest.raises(NotFound):
        resolve_expression(registry, "style")
    assert register(registry, "style").version == 1
    assert verify_registry(registry) == (2, [])


def _add_five(root, worker, barrier, results):
    registry = Registry(root)
    barrier.wait()
    for turn in range(5):
        results.put(register(registry, "style", seed=10 * worker + turn).version)


def test_eight_processes_add_five_versions_each(registry):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(8), context.Queue()
    workers = [
        context.Process(target=_add_five, args=(registry.root, n, barrier, results), daemon=True) for n in range(8)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0] * 8
    versions = [results.get(timeout=5) for _ in range(40)]
    assert sorted(versions) == list(range(1, 41))
    assert [v.version for v in registry.find_adapter("style").versions] == list(range(1, 41))
    assert len({v.digest for v in registry.find_adapter("style").versions}) == 40
    assert verify_registry(registry) == (41, [])


def test_a_held_lock_is_an_error_and_readers_go_on(storyteller, monkeypatch):
    monkeypatch.setenv("STACKCTL_LOCK_TIMEOUT", "0.1")
    with storyteller.lock():
        assert resolve_expression(storyteller, "storyteller").members
        with pytest.raises(Failed):
            use_stack(storyteller, "storyteller")


def test_links_point_outside_and_are_left_alone(registry, tmp_path):
    outside = write_checkpoint(tmp_path / "ou tside" / "é")
    from stackctl.lora.checkpoint import read_checkpoint

    digest = read_checkpoint(outside).digest()
    for name, path in (("rel", os.path.relpath(outside, registry.root)), ("abs", str(outside))):
        add_version(
            registry,
            name,
            lambda n, p=path: msgspec.structs.replace(full_version(n), digest=digest, path=p, trained_on=[]),
            None,
        )
        assert registry.weights_path(registry.find_adapter(name).newest()) == outside.resolve()
        assert verify_registry(registry, {f"{name}@1"}) == (1, [])
        remove_entry(registry, name)
    assert (outside / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", ["weights/style/1", "weights", "weights/style", ".", "weights/../bases"])
def test_removing_a_link_into_the_registry_removes_nothing_of_others(registry, path):
    register(registry, "style")
    add_version(registry, "linked", lambda n: msgspec.structs.replace(full_version(n), path=path, trained_on=[]), None)
    remove_entry(registry, "linked")
    assert verify_registry(registry) == (2, [])


def test_rm_refuses_while_something_stands_on_it(storyteller):
    with pytest.raises(Usage) as caught:
        remove_entry(storyteller, "style")
    assert "instruct@1" in caught.value.message
    assert "storyteller" in caught.value.message
    with pytest.raises(Usage):
        remove_entry(storyteller, "style@1")
    with pytest.raises(Usage):
        remove_base(storyteller, "tiny")
    assert remove_entry(storyteller, "storyteller").removed == ("storyteller",)
    assert remove_entry(storyteller, "instruct@1").removed == ("instruct@1",)
    assert remove_entry(storyteller, "style").removed == ("style@1",)
    remove_base(storyteller, "tiny")
    assert storyteller.settings() == RegistryFile()


def test_of_many_that_depend_on_it_some_are_named(registry):
    """A registry of 5,000 adapters filled the screen."""
    register(registry, "style")
    for number in range(25):
        register(registry, f"on{number:02}", ["style@1"], seed=number)
    with pytest.raises(Usage, match=r"depends on it: on00@1, .*, on19@1 and 5 more$"):
        remove_entry(registry, "style")
    with pytest.raises(Usage, match=r"depends on it: on00@1, .* and 6 more$"):
        remove_base(registry, "tiny")


def test_rm_of_one_version(registry):
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    register(registry, "instruct", ["style@1:0.5"])
    assert remove_entry(registry, "style@2").removed == ("style@2",)
    assert resolve_expression(registry, "style").pinned == "style@1"
    with pytest.raises(Usage):
        remove_entry(registry, "style")
    with pytest.raises(NotFound):
        remove_entry(registry, "style@2")


def test_an_adapter_may_be_removed_with_its_own_later_versions(registry):
    register(registry, "style", seed=1)
    add_version(registry, "style", lambda n: msgspec.structs.replace(full_version(n), trained_on=["style@1"]), None)
    with pytest.raises(Usage):
        remove_entry(registry, "style@1")
    assert remove_entry(registry, "style").removed == ("style@1", "style@2")


@pytest.mark.parametrize("text", ["base", "style+instruct", "style:0.5", "tiny", "storyteller@1"])
def test_what_rm_does_not_remove(storyteller, text):
    with pytest.raises(StackctlError) as caught:
        remove_entry(storyteller, text)
    assert caught.value.exit_code in (2, 3)
    assert verify_registry(storyteller) == (4, [])


def test_similar_names_are_different_things(registry):
    for name in ("foo", "foobar", "foo-1"):
        register(registry, name)
    register(registry, "upper", ["foobar@1"])
    assert remove_entry(registry, "foo").removed == ("foo@1",)
    assert verify_registry(registry) == (4, [])
    with pytest.raises(Usage):
        remove_entry(registry, "foobar")


def test_saving_a_stack_whose_member_is_gone(storyteller):
    resolved = resolve_expression(storyteller, "instruct")
    remove_entry(storyteller, "storyteller")
    remove_entry(storyteller, "instruct")
    with pytest.raises(NotFound):
        save_stack(storyteller, "late", resolved)
    assert storyteller.names(Stack) == []
    assert isinstance(resolved, ResolvedStack)


def test_references(storyteller):
    assert resolve_adapter(storyteller, Reference("style")).label == "style@1"
    with pytest.raises(NotFound):
        resolve_adapter(storyteller, Reference("style", 9))


def test_a_refused_adapter_is_refused_by_its_plan(registry, tmp_path):
    folder = write_checkpoint(tmp_path / "dora", lora_config(use_dora=True))
    digest = read_checkpoint(folder).digest()
    add_version(
        registry,
        "dora",
        lambda n: msgspec.structs.replace(full_version(n), path=str(folder), trained_on=[], digest=digest),
        None,
    )
    with pytest.raises(Incompatible) as caught:
        read_plan(registry, resolve_expression(registry, "dora")).check()
    assert "DoRA" in caught.value.message


def test_nothing_is_changed_when_the_settings_cannot_be_read(run, tmp_path):
    registry = make_registry(tmp_path / "registry", make_base())
    register(registry, "style")
    run("compose", "style", "--name", "both")
    (registry.root / "registry.yaml").write_text("schema: [1\n")
    before = {path: path.read_bytes() for path in registry.root.rglob("*.yaml")}
    for arguments in (("rm", "both"), ("compose", "style", "--name", "again"), ("base", "rm", "tiny")):
        run(*arguments, code=2)
    assert {path: path.read_bytes() for path in registry.root.rglob("*.yaml")} == before


def test_weights_whose_entry_cannot_be_written_do_not_stay(registry, monkeypatch):
    register(registry, "style")
    write = atomic.written_after

    def full(path, content):
        if path.parent.name == "adapters":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "written_after", full)
        with pytest.raises(OSError, match="No space"):
            register(registry, "style", seed=1)
    assert [path.name for path in (registry.root / "weights" / "style").iterdir()] == ["1"]
    assert [version.version for version in registry.find_adapter("style").versions] == [1]
    assert register(registry, "style", seed=1).version == 2
    assert verify_registry(registry)[1] == []


def entries(registry):
    return {path: path.read_bytes() for path in registry.root.rglob("*.yaml")}


def fails_on_a_full_disk(monkeypatch, registry, change, is_full):
    """A change that fails where a file in a full folder begins, and leaves all entries as they were."""
    before, claim = entries(registry), atomic.tempfile.mkstemp

    def full(prefix, dir):
        if is_full(dir):
            raise OSError(errno.ENOSPC, "No space left on device", str(dir))
        return claim(prefix=prefix, dir=dir)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.tempfile, "mkstemp", full)
        with pytest.raises(OSError, match="No space"):
            change()
    assert entries(registry) == before


@pytest.mark.parametrize("what", ["compose", "rm", "base add", "base rm"])
def test_a_full_disk_leaves_an_entry_and_what_the_settings_say_of_it_as_they_were(registry, monkeypatch, what):
    """The settings are the second file of one change; when there is no space for them, the first stays too."""
    register(registry, "style")
    stack = resolve_expression(registry, "style")
    save_stack(registry, "s", stack)
    if what.startswith("base"):
        with registry.settings_after(RegistryFile(current="s")):
            save_base(registry, make_base("other"))
        if what == "base rm":
            with registry.settings_after(RegistryFile(current="s", defaults=Defaults(base="other"))):
                pass
        else:
            registry.delete(Base, "other")
            with registry.settings_after(RegistryFile(current="s")):
                pass
    changes = {
        "compose": lambda: save_stack(registry, "t", stack),
        "rm": lambda: remove_entry(registry, "s"),
        "base add": lambda: save_base(registry, make_base("other")),
        "base rm": lambda: remove_base(registry, "other"),
    }

    before = entries(registry)
    fails_on_a_full_disk(monkeypatch, registry, changes[what], lambda folder: folder == registry.root)
    changes[what]()
    assert entries(registry) != before
    assert not [*registry.root.rglob(".tmp-*")]


@pytest.mark.parametrize("full_folder", ["adapters", "removed"])
@pytest.mark.parametrize("what", ["rm", "again", "on"])
def test_a_full_disk_leaves_a_version_in_the_one_place_where_it_was(registry, monkeypatch, what, full_folder):
    """It is registered, or removed; the files of both are changed together or not at all."""
    register(registry, "style")
    second = register(registry, "style", seed=1)
    given = GivenNumber(version=2, digest=second.digest)
    if what != "rm":
        remove_entry(registry, "style@2")
    changes = {
        "rm": lambda: remove_entry(registry, "style@2"),
        "again": lambda: add_version(registry, "style", lambda number: second, None, given=given),
        "on": lambda: register(registry, "poem", ["style@2"], seed=2),
    }

    fails_on_a_full_disk(monkeypatch, registry, changes[what], lambda folder: folder.name == full_folder)
    changes[what]()
    here = {version.version for version in registry.find_adapter("style").versions}
    gone = {version.version for version in registry.find_removed("style").versions}
    assert (here, gone) == (({1}, {2}) if what == "rm" else ({1, 2}, set()))
    assert verify_registry(registry)[1] == [] and not [*registry.root.rglob(".tmp-*")]
