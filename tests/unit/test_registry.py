"""The registry: nothing half there, nothing lost, nothing taken for another, every error with a way on."""

import errno
import multiprocessing
import os
import shutil

import msgspec
import pytest
from checkpoints import FINGERPRINT, lora_config, make_base, make_registry, register, write_checkpoint

from stackctl import files
from stackctl.checkpoint import read_checkpoint
from stackctl.errors import Failed, Incompatible, NotFound, StackctlError, Usage, VerificationFailed
from stackctl.names import Reference
from stackctl.registry import Registry, ResolvedStack, find_registry, init_registry
from stackctl.schema import (
    Adapter,
    AdapterVersion,
    Base,
    DataSource,
    Defaults,
    HubSource,
    Lora,
    RegistryFile,
    Run,
    Stack,
)

OTHER = "sha256:" + "0" * 64


pytestmark = pytest.mark.usefixtures("no_power_cuts")


@pytest.fixture
def registry(tmp_path):
    return make_registry(tmp_path / "my régistry", make_base())


@pytest.fixture
def storyteller(registry):
    """style@1, instruct@1 on it, and a stack of both."""
    register(registry, "style")
    register(registry, "instruct", ["style@1"], seed=1)
    registry.save_stack("storyteller", registry.resolve("style:0.5+instruct"))
    return registry


def labels(stack):
    return [str(member) for member in stack.members]


# -- finding and making ---------------------------------------------------------------------------------------------


def test_init_is_done_once(tmp_path):
    assert init_registry(tmp_path / "registry")
    assert not init_registry(tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    assert registry.settings() == RegistryFile()
    assert [registry.names(kind) for kind in (Base, Adapter, Stack)] == [[], [], []]
    assert registry.verify() == (0, [])


def test_init_keeps_what_is_there(tmp_path):
    (tmp_path / ".gitignore").write_text("*.pyc\nweights/")
    (tmp_path / "README").write_text("mine")
    init_registry(tmp_path)
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["*.pyc", "weights/"]
    assert lines.count("weights/") == 1
    assert {"runs/", ".lock", ".tmp-*"} <= set(lines)
    assert (tmp_path / "README").read_text() == "mine"


def test_init_on_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(Usage):
        init_registry(tmp_path / "x")


def test_where_the_registry_is(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "a b" / "ü", tmp_path / "elsewhere"
    (here / "deep" / "er").mkdir(parents=True)
    init_registry(here / "registry")
    init_registry(elsewhere)
    monkeypatch.delenv("STACKCTL_REGISTRY", raising=False)
    monkeypatch.chdir(here / "deep" / "er")
    assert find_registry(None) == (here / "registry").resolve()
    monkeypatch.setenv("STACKCTL_REGISTRY", str(elsewhere))
    assert find_registry(None) == elsewhere.resolve()
    assert find_registry(here) == (here / "registry").resolve()
    assert find_registry(here / "registry") == (here / "registry").resolve()
    with pytest.raises(NotFound) as caught:
        find_registry(tmp_path / "nowhere")
    assert "stackctl init" in caught.value.hint
    monkeypatch.setenv("STACKCTL_REGISTRY", "")
    assert find_registry(None) == (here / "registry").resolve()
    monkeypatch.chdir(elsewhere / "bases")
    assert find_registry(None) == elsewhere.resolve()


def test_no_registry(tmp_path, monkeypatch):
    monkeypatch.delenv("STACKCTL_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound) as caught:
        Registry.open()
    assert caught.value.hint == "stackctl init"


# -- round trips ----------------------------------------------------------------------------------------------------


def full_version(number):
    return AdapterVersion(
        version=number, digest="sha256:1", path=f"weights/x/{number}", base="tiny", fingerprint=FINGERPRINT,
        trained_on=["style@1:0.7", "other@2"], created="2026-01-31T12:00:00Z",
        lora=Lora(r=16, lora_alpha=0.5, target_modules=["on", "1e-5", "no"], rank_pattern={"q.*": 3}, use_rslora=True),
        parameters=10**12, dtype="bfloat16", bytes=7,
        data=DataSource(path="a b/ü: x.jsonl", sha256="0" * 64, records=3, format="messages"),
        settings={"learning_rate": 1e-5, "target_modules": "all-linear", "alpha": None, "pack": False, "seed": 0},
        run=Run(steps=5, epochs=2.5, loss=1e-7, tokens=9, supervised_tokens=8, seconds=0.1, frozen="fold",
        eval_loss=1e300),
        hub=HubSource(repo="me/x", commit="1234567"), versions={"torch": "2.13.0+cpu", "peft": "1.0"},
    )  # fmt: skip


def test_every_entry_survives_its_round_trip(registry):
    base = msgspec.structs.replace(
        make_base("big"), revision="1e5", context_length=8192, tied_embeddings=True, path=None
    )
    adapter = Adapter(name="x", description="on: #1\n  two lines\n", versions=[full_version(1), full_version(3)])
    for entry in (base, adapter):
        registry._write(entry)
        assert registry._read(type(entry), entry.name) == entry
    register(registry, "keys")
    stack = registry.save_stack("s", registry.resolve("keys:-0.25"))
    assert registry.find_stack("s") == stack
    settings = RegistryFile(current="s", defaults=Defaults(base="on"))
    registry._write_settings(settings)
    assert registry.settings() == settings


def test_writing_the_same_twice_changes_no_byte(storyteller):
    path = storyteller._entry_path(Stack, "storyteller")
    before = path.read_bytes()
    storyteller.save_stack("storyteller", storyteller.resolve("style:0.5+instruct"))
    assert path.read_bytes() == before


# -- hand-edited files ----------------------------------------------------------------------------------------------


HAND_WRITTEN = """\
schema: 1
name: style
versions:
  - version: 1
    digest: sha256:1
    path: weights/style/1
    base: tiny
    fingerprint: sha256:f
    trained_on: [a@1, b@2:0.5]
    created: 2026-01-31T12:00:00Z
    lora: {r: 16, lora_alpha: 32, target_modules: [q_proj], use_rslora: false}
    parameters: 4884480
    dtype: float32
    run: {steps: 1, epochs: 1, loss: 1.5, tokens: 1, supervised_tokens: 1, seconds: 1, frozen: fold}
"""


def test_an_entry_written_by_hand_is_read(registry):
    registry._entry_path(Adapter, "style").write_text(HAND_WRITTEN)
    version = registry.find_adapter("style").newest()
    assert version.created == "2026-01-31T12:00:00Z"
    assert version.run.frozen == "fold"


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("parameters:", "paramters:", "line 12, column 16"),
        ("- version: 1", "- version: one", "line 4, column 14"),
        ("r: 16", "r: '16'", "line 11, column 15"),
        ("r: 16", "rank: 16", "line 11, column 18"),
        ("4884480", "4.5", "line 12, column 17"),
        ("frozen: fold", "frozen: on", "line 14"),
        ("[a@1, b@2:0.5]", "[a@1, 2]", "line 9, column 23"),
        ("schema: 1", "schema: 2", "line 1, column 9"),
        ("schema: 1", "schemas: 1", "line 1, column 1"),
        ("name: style", "name: style\nname: style", "line 3, column 1"),
        ("use_rslora: false", "use_rslora: false, r: 8", "line 11"),
        ("name: style", "name: !!str style", "line 2, column 7"),
        ("name: style", "name: *x", "line 2, column 7"),
        ("name: style", "\tname: style", "line 2, column 1"),
        ("sha256:1", "[sha256:1", "line 6"),
        ("name: style", "name: sty\0le", "line 2"),
        ("versions:", "---\nversions:", "line 3, column 1"),
    ],
)
def test_a_mistake_in_a_file_is_named_with_line_and_column(registry, old, new, place):
    path = registry._entry_path(Adapter, "style")
    assert old in HAND_WRITTEN
    path.write_text(HAND_WRITTEN.replace(old, new, 1))
    with pytest.raises(Usage) as caught:
        registry.resolve("style")
    assert f"{path}, {place}" in caught.value.message
    assert caught.value.hint


def test_a_file_under_another_name(registry):
    register(registry, "style")
    shutil.copy(registry._entry_path(Adapter, "style"), registry._entry_path(Adapter, "copy"))
    with pytest.raises(Usage) as caught:
        registry.resolve("copy")
    assert "style" in caught.value.message


@pytest.mark.parametrize("versions", [[], [1, 1], [2, 1], [0], [-1]])
def test_versions_out_of_order(registry, versions):
    registry._write(Adapter(name="x", versions=[full_version(number) for number in versions]))
    with pytest.raises(Usage):
        registry.resolve("x")


def test_files_with_crlf_and_byte_order_mark(storyteller):
    for path in storyteller.root.rglob("*.yaml"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert labels(storyteller.resolve()) == ["style@1:0.5", "instruct@1"]


def test_a_broken_stack_is_an_error_and_not_an_expression(registry):
    register(registry, "a")
    register(registry, "b")
    registry.save_stack("a+b", registry.resolve("a+b"))
    registry._entry_path(Stack, "a+b").write_text("schema: 1\nname: [\n")
    with pytest.raises(Usage) as caught:
        registry.resolve("a+b")
    assert "a+b.yaml" in caught.value.message


def test_other_files_are_no_entries(registry):
    (registry.root / "adapters" / ".tmp-x.yaml").write_text("half")
    (registry.root / "adapters" / ".hidden.yaml").write_text("half")
    (registry.root / "adapters" / "README.md").write_text("x")
    assert registry.names(Adapter) == []
    assert list(registry.adapters()) == []


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["keys", "forward", "lora", "default", "0", "weights", "a.yaml", "x" * 64, "1e5", "null", "on"]
)
def test_names_that_are_words_elsewhere(registry, name):
    register(registry, name)
    assert labels(registry.resolve(name)) == [f"{name}@1"]
    assert labels(registry.resolve(f"{name}@1:2")) == [f"{name}@1:2"]
    assert registry.names(Adapter) == [name]
    registry.save_stack("s", registry.resolve(f"{name}:0.5"))
    assert registry.find_stack("s").members[0].adapter == name
    assert not registry.plan(registry.resolve("s")).problems
    assert registry.verify()[1] == []
    registry.remove("s")
    assert registry.remove(name).removed == (f"{name}@1",)


@pytest.mark.parametrize("name", ["../x", "..", "", "base", "X", "a/b", "a\0", "a\n", "x" * 65, "a+b", "a@1", "/tmp/x"])
def test_names_that_are_refused_before_anything_is_written(registry, name):
    before = sorted(registry.root.rglob("*"))
    for act in (
        lambda: registry.check_adapter_name(name),
        lambda: registry.add_version(name, full_version, None),
        lambda: registry.save_base(make_base(name)),
        lambda: registry.find_adapter(name),
        lambda: registry.find_base(name),
    ):
        with pytest.raises(Usage) as caught:
            act()
        assert caught.value.exit_code == 2
    assert [p for p in sorted(registry.root.rglob("*")) if p.name != ".lock"] == [
        p for p in before if p.name != ".lock"
    ]


@pytest.mark.parametrize(
    "text", ["../x", "", "X", "a/b", "a\0", "style+", "+", "base+style", "style:nan", "style:1e999", "x" * 65]
)
def test_text_that_is_no_expression(storyteller, text):
    for act in (storyteller.resolve, storyteller.remove, storyteller.use):
        with pytest.raises(StackctlError) as caught:
            act(text)
        assert caught.value.exit_code in (2, 3)


def test_a_mistyped_name_hints_at_the_nearest(storyteller):
    for text, near in (
        ("stlye", "style"),
        ("story-teller", "storyteller"),
        ("instruct+stile", "style"),
        ("tinny", "tiny"),
    ):
        with pytest.raises(NotFound) as caught:
            storyteller.resolve(text)
        assert caught.value.exit_code == 3
        assert f"'{near}'" in caught.value.hint
    with pytest.raises(NotFound) as caught:
        storyteller.base("tinyy")
    assert "'tiny'" in caught.value.hint
    with pytest.raises(NotFound) as caught:
        storyteller.use("storytelle")
    assert "'storyteller'" in caught.value.hint


def test_a_missing_version_says_which_there_are(storyteller):
    register(storyteller, "style")
    with pytest.raises(NotFound) as caught:
        storyteller.resolve("style@7")
    assert "1, 2" in caught.value.message
    assert "style@2" in caught.value.hint


def test_adapters_and_stacks_share_their_names(storyteller):
    with pytest.raises(Usage):
        register(storyteller, "storyteller")
    with pytest.raises(Usage):
        storyteller.save_stack("style", storyteller.resolve("style"))
    assert not (storyteller.root / "weights" / "storyteller" / "1").exists()


def test_a_name_with_plus_is_only_ever_its_own_expression(storyteller):
    resolved = storyteller.resolve("instruct")
    for name in ("style+instruct", "instruct+style", "base+instruct"):
        with pytest.raises(Usage):
            storyteller.save_stack(name, resolved)
    both = storyteller.resolve("style@1:0.25+instruct")
    assert both.default_name == "style+instruct"
    storyteller.save_stack(both.default_name, both)
    assert labels(storyteller.resolve("style+instruct")) == ["style@1:0.25", "instruct@1"]
    assert labels(storyteller.resolve("instruct+style")) == ["instruct@1", "style@1"]


def test_an_expression_longer_than_a_file_name(registry):
    names = [letter * 60 for letter in "abcdef"]
    for name in names:
        register(registry, name)
    text = "+".join(names)
    resolved = registry.resolve(text)
    assert len(resolved.members) == 6
    with pytest.raises(Usage):
        registry.save_stack(resolved.default_name, resolved)
    registry.save_stack("short", resolved)


# -- resolving ------------------------------------------------------------------------------------------------------


def test_expressions(storyteller):
    assert labels(storyteller.resolve("style+instruct:0.5")) == ["style@1", "instruct@1:0.5"]
    assert labels(storyteller.resolve("style:-1")) == ["style@1:-1"]
    assert labels(storyteller.resolve("style:1e+5+instruct")) == ["style@1:100000", "instruct@1"]
    assert storyteller.resolve("base").members == ()
    assert storyteller.resolve("base").base.name == "tiny"
    assert storyteller.resolve("tiny").members == ()
    assert storyteller.resolve("base").default_name == storyteller.resolve("base").pinned == "base"


def test_the_newest_version_is_meant_and_pinned(storyteller):
    register(storyteller, "style", seed=2)
    assert storyteller.resolve("style").pinned == "style@2"
    assert storyteller.resolve("style@1").pinned == "style@1"


def test_a_stored_stack_stays_pinned(storyteller):
    register(storyteller, "style", seed=2)
    stack = storyteller.resolve("storyteller")
    assert labels(stack) == ["style@1:0.5", "instruct@1"]
    assert stack.name == "storyteller"
    assert any("style@2" in note for note in stack.notes)
    assert labels(storyteller.resolve("style+instruct")) == ["style@2", "instruct@1"]
    storyteller.save_stack("storyteller", storyteller.resolve("style:0.5+instruct"))
    assert labels(storyteller.resolve("storyteller")) == ["style@2:0.5", "instruct@1"]
    assert not storyteller.resolve("storyteller").notes


def test_named_stacks_inside_expressions_multiply_their_weights(storyteller):
    register(storyteller, "poem")
    assert labels(storyteller.resolve("storyteller:0.5+poem")) == ["style@1:0.25", "instruct@1:0.5", "poem@1"]
    assert labels(storyteller.resolve("storyteller:0")) == ["style@1:0", "instruct@1:0"]
    assert labels(storyteller.resolve("storyteller:-2")) == ["style@1:-1", "instruct@1:-2"]
    storyteller.save_stack("outer", storyteller.resolve("storyteller:0.5+poem:2"))
    assert labels(storyteller.resolve("outer:0.5")) == ["style@1:0.125", "instruct@1:0.25", "poem@1"]


def test_a_stack_inside_an_expression_stays_pinned(storyteller):
    register(storyteller, "style", seed=2)
    register(storyteller, "poem")
    assert labels(storyteller.resolve("storyteller+poem"))[0] == "style@1:0.5"


def test_products_of_weights_are_finite(storyteller):
    storyteller.save_stack("big", storyteller.resolve("style:1e200"))
    with pytest.raises(Usage) as caught:
        storyteller.resolve("big:1e200")
    assert caught.value.exit_code == 2


def test_a_stack_has_no_versions(storyteller):
    with pytest.raises(Usage):
        storyteller.resolve("storyteller@1")


def test_the_same_adapter_twice_is_a_problem_of_the_plan(storyteller):
    for text in ("style+style", "storyteller+style", "style:0.5+style@1:0.5"):
        with pytest.raises(Incompatible) as caught:
            storyteller.plan(storyteller.resolve(text)).check()
        assert "twice" in caught.value.message


def test_bases_that_differ(registry):
    registry.save_base(make_base("other", OTHER))
    register(registry, "style")
    register(registry, "far", base="other")
    with pytest.raises(Incompatible) as caught:
        registry.resolve("style+far")
    assert caught.value.exit_code == 4
    assert "style@1 on tiny" in caught.value.message
    assert "far@1 on other" in caught.value.message
    with pytest.raises(Incompatible):
        registry.resolve("style", base="other")
    assert registry.resolve("base", base="other").base.name == "other"
    assert registry.resolve("far").base.name == "other"


def test_which_base_is_meant(tmp_path):
    empty = make_registry(tmp_path / "a")
    empty.remove_base("tiny")
    with pytest.raises(NotFound):
        empty.resolve("base")
    two = make_registry(tmp_path / "b", make_base("one"), make_base("two", OTHER))
    assert two.resolve("base").base.name == "one"
    two.remove_base("one")
    assert two.resolve("base").base.name == "two"
    two.save_base(make_base("three"))
    two._write_settings(RegistryFile())
    with pytest.raises(Usage) as caught:
        two.resolve("base")
    assert "three, two" in caught.value.message


def test_the_current_stack(storyteller):
    assert storyteller.current() == "storyteller"
    storyteller.save_stack("second", storyteller.resolve("style"))
    assert storyteller.resolve().name == "second"
    assert storyteller.use("storyteller").name == "storyteller"
    assert storyteller.resolve().name == "storyteller"
    storyteller.remove("storyteller")
    with pytest.raises(Usage):
        storyteller.resolve()


def test_a_stack_on_a_base_that_has_become_another(storyteller):
    storyteller._write(make_base("tiny", OTHER))
    with pytest.raises(Incompatible):
        storyteller.resolve("storyteller")
    plan = storyteller.plan(storyteller.resolve("style"))
    assert [p.code for p in plan.errors] == ["other_base"]


def test_a_base_that_is_not_registered(storyteller):
    storyteller._entry_path(Base, "tiny").unlink()
    for text in ("style", "storyteller"):
        with pytest.raises(NotFound):
            storyteller.resolve(text)
    assert {p["what"] for p in storyteller.verify()[1]} == {"storyteller", "style@1", "instruct@1"}


def test_the_name_of_a_base_is_of_one_model(registry):
    registry.save_base(make_base())
    with pytest.raises(Usage):
        registry.save_base(make_base("tiny", OTHER))


# -- plans and digests ----------------------------------------------------------------------------------------------


def test_a_plan_of_a_stored_stack(storyteller):
    plan = storyteller.plan(storyteller.resolve("storyteller")).check()
    assert plan.rank == 4
    assert [m.label for m in plan.members] == ["style@1", "instruct@1"]
    assert [p.code for p in plan.problems] == ["foundation"]
    storyteller.check_digests(storyteller.resolve("storyteller").members)


def test_weights_that_changed(storyteller):
    write_checkpoint(storyteller.root / "weights" / "style" / "1", seed=9)
    with pytest.raises(VerificationFailed) as caught:
        storyteller.check_digests(storyteller.resolve("storyteller").members)
    assert caught.value.exit_code == 5
    assert "style@1" in caught.value.message
    assert [p["what"] for p in storyteller.verify()[1]] == ["style@1"]
    assert storyteller.verify({"instruct@1"}) == (1, [])
    assert storyteller.verify({"style@1"})[1]


def test_weights_that_are_gone(storyteller):
    shutil.rmtree(storyteller.root / "weights" / "style")
    with pytest.raises(NotFound) as caught:
        storyteller.plan(storyteller.resolve("style"))
    assert "style@1" in caught.value.message
    assert [p["what"] for p in storyteller.verify()[1]] == ["style@1"]


def test_weights_that_are_cut_off(storyteller):
    path = storyteller.root / "weights" / "style" / "1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationFailed):
        storyteller.plan(storyteller.resolve("style"))


def test_a_stack_whose_member_was_replaced(storyteller):
    adapter = storyteller.find_adapter("style")
    version = msgspec.structs.replace(adapter.versions[0], digest="sha256:other")
    storyteller._write(msgspec.structs.replace(adapter, versions=[version]))
    with pytest.raises(VerificationFailed):
        storyteller.resolve("storyteller")


def test_verify_counts_and_reports_everything(storyteller):
    assert storyteller.verify() == (4, [])
    (storyteller.root / "registry.yaml").write_text("schema: 9\n")
    storyteller._entry_path(Base, "tiny").write_text("schema: 1\n")
    storyteller._entry_path(Stack, "storyteller").write_text("[")
    storyteller._entry_path(Adapter, "style").write_text("schema: 1\nname: style\nname: x\n")
    problems = storyteller.verify()[1]
    assert {p["what"] for p in problems} >= {"registry", "tiny", "storyteller", "style", "instruct@1"}
    assert all(p["message"] for p in problems)


# -- changing -------------------------------------------------------------------------------------------------------


def test_versions_count_up_and_keep_their_weights(registry):
    for number in (1, 2, 3):
        assert register(registry, "style", seed=number).version == number
    folders = sorted(p.name for p in (registry.root / "weights" / "style").iterdir())
    assert folders == ["1", "2", "3"]
    assert registry.verify() == (4, [])


class Kill(BaseException):
    """What a kill looks like from inside."""


@pytest.mark.parametrize("moment", ["build", "publish", "entry"])
def test_a_kill_at_any_moment_leaves_the_registry_valid(registry, monkeypatch, moment):
    register(registry, "style", seed=1)
    before = registry._entry_path(Adapter, "style").read_bytes()

    def die(*_):
        raise Kill

    with monkeypatch.context() as patch:
        if moment == "publish":
            patch.setattr(files, "publish_directory", die)
        if moment == "entry":
            patch.setattr(files, "write_atomic", die)
        with pytest.raises(Kill):
            register(registry, "style", seed=2, before_entry=die if moment == "build" else lambda _: None)
    assert registry._entry_path(Adapter, "style").read_bytes() == before
    assert registry.resolve("style").pinned == "style@1"
    assert registry.verify() == (2, [])
    again = register(registry, "style", seed=3)
    assert again.version == 2
    assert registry.verify() == (3, [])
    assert not list(registry.root.rglob(".tmp-*"))


def test_a_first_version_that_was_killed_does_not_exist(registry, monkeypatch):
    def die(*_):
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", die)
        with pytest.raises(Kill):
            register(registry, "style")
    assert registry.names(Adapter) == []
    with pytest.raises(NotFound):
        registry.resolve("style")
    assert register(registry, "style").version == 1
    assert registry.verify() == (2, [])


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
    assert registry.verify() == (41, [])


def test_a_held_lock_is_an_error_and_readers_go_on(storyteller, monkeypatch):
    monkeypatch.setenv("STACKCTL_LOCK_TIMEOUT", "0.1")
    with storyteller.lock():
        assert storyteller.resolve("storyteller").members
        with pytest.raises(Failed):
            storyteller.use("storyteller")


def test_links_point_outside_and_are_left_alone(registry, tmp_path):
    outside = write_checkpoint(tmp_path / "ou tside" / "é")
    from stackctl.checkpoint import read_checkpoint

    digest = read_checkpoint(outside).digest()
    for name, path in (("rel", os.path.relpath(outside, registry.root)), ("abs", str(outside))):
        registry.add_version(
            name, lambda n, p=path: msgspec.structs.replace(full_version(n), digest=digest, path=p, trained_on=[]), None
        )
        assert registry.weights_path(registry.find_adapter(name).newest()) == outside.resolve()
        assert registry.verify({f"{name}@1"}) == (1, [])
        registry.remove(name)
    assert (outside / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("path", ["weights/style/1", "weights", "weights/style", ".", "weights/../bases"])
def test_removing_a_link_into_the_registry_removes_nothing_of_others(registry, path):
    register(registry, "style")
    registry.add_version("linked", lambda n: msgspec.structs.replace(full_version(n), path=path, trained_on=[]), None)
    registry.remove("linked")
    assert registry.verify() == (2, [])


def test_rm_refuses_while_something_stands_on_it(storyteller):
    with pytest.raises(Usage) as caught:
        storyteller.remove("style")
    assert "instruct@1" in caught.value.message
    assert "storyteller" in caught.value.message
    with pytest.raises(Usage):
        storyteller.remove("style@1")
    with pytest.raises(Usage):
        storyteller.remove_base("tiny")
    assert storyteller.remove("storyteller").removed == ("storyteller",)
    assert storyteller.remove("instruct@1").removed == ("instruct@1",)
    assert storyteller.remove("style").removed == ("style@1",)
    storyteller.remove_base("tiny")
    assert storyteller.settings() == RegistryFile()


def test_rm_of_one_version(registry):
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    register(registry, "instruct", ["style@1:0.5"])
    assert registry.remove("style@2").removed == ("style@2",)
    assert registry.resolve("style").pinned == "style@1"
    with pytest.raises(Usage):
        registry.remove("style")
    with pytest.raises(NotFound):
        registry.remove("style@2")


def test_an_adapter_may_be_removed_with_its_own_later_versions(registry):
    register(registry, "style", seed=1)
    registry.add_version("style", lambda n: msgspec.structs.replace(full_version(n), trained_on=["style@1"]), None)
    with pytest.raises(Usage):
        registry.remove("style@1")
    assert registry.remove("style").removed == ("style@1", "style@2")


@pytest.mark.parametrize("text", ["base", "style+instruct", "style:0.5", "tiny", "storyteller@1"])
def test_what_rm_does_not_remove(storyteller, text):
    with pytest.raises(StackctlError) as caught:
        storyteller.remove(text)
    assert caught.value.exit_code in (2, 3)
    assert storyteller.verify() == (4, [])


def test_similar_names_are_different_things(registry):
    for name in ("foo", "foobar", "foo-1"):
        register(registry, name)
    register(registry, "upper", ["foobar@1"])
    assert registry.remove("foo").removed == ("foo@1",)
    assert registry.verify() == (4, [])
    with pytest.raises(Usage):
        registry.remove("foobar")


def test_saving_a_stack_whose_member_is_gone(storyteller):
    resolved = storyteller.resolve("instruct")
    storyteller.remove("storyteller")
    storyteller.remove("instruct")
    with pytest.raises(NotFound):
        storyteller.save_stack("late", resolved)
    assert storyteller.names(Stack) == []
    assert isinstance(resolved, ResolvedStack)


def test_references(storyteller):
    assert storyteller.resolve_adapter(Reference("style")).label == "style@1"
    with pytest.raises(NotFound):
        storyteller.resolve_adapter(Reference("style", 9))


def test_a_refused_adapter_is_refused_by_its_plan(registry, tmp_path):
    folder = write_checkpoint(tmp_path / "dora", lora_config(use_dora=True))
    digest = read_checkpoint(folder).digest()
    registry.add_version(
        "dora",
        lambda n: msgspec.structs.replace(full_version(n), path=str(folder), trained_on=[], digest=digest),
        None,
    )
    with pytest.raises(Incompatible) as caught:
        registry.plan(registry.resolve("dora")).check()
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
    write = files.write_atomic

    def full(path, content):
        if path.parent.name == "adapters":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            register(registry, "style", seed=1)
    assert [path.name for path in (registry.root / "weights" / "style").iterdir()] == ["1"]
    assert [version.version for version in registry.find_adapter("style").versions] == [1]
    assert register(registry, "style", seed=1).version == 2
    assert registry.verify()[1] == []
