"""The registry as files: made once, found from below, written and read again; mistakes by hand are named."""

import shutil
from pathlib import Path

import msgspec
import pytest
from checkpoints import full_version, labels, make_base, make_registry, register, register_three

from stackctl.core.errors import NotFound, Usage
from stackctl.core.schema import Adapter, Base, Defaults, RegistryFile, Stack
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.stacks import save_stack
from stackctl.registry.store import Registry, find_registry, init_registry
from stackctl.registry.verify import verify_registry

# -- finding and making ---------------------------------------------------------------------------------------------


def test_init_is_done_once(tmp_path):
    assert init_registry(tmp_path / "registry")
    assert not init_registry(tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    assert registry.settings() == RegistryFile()
    assert [registry.names(kind) for kind in (Base, Adapter, Stack)] == [[], [], []]
    assert verify_registry(registry) == (0, [])


def test_init_keeps_what_is_there(tmp_path):
    (tmp_path / ".gitignore").write_text("*.pyc\nweights/")
    (tmp_path / "README").write_text("mine")
    init_registry(tmp_path)
    lines = (tmp_path / ".gitignore").read_text().splitlines()
    assert lines[:2] == ["*.pyc", "weights/"]
    assert lines.count("weights/") == 1
    assert {"runs/", ".lock", ".tmp-*"} <= set(lines)
    assert (tmp_path / "README").read_text() == "mine"


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    """Else one number takes all versions of an adapter with it."""
    registry = make_registry(tmp_path / "registry")
    register(registry, "style", seed=1)
    adapter = registry.find_adapter("style")
    (version,) = adapter.versions
    wrong = msgspec.structs.replace(version, settings={"max_length": 10**30})
    with pytest.raises(msgspec.ValidationError):
        registry.write(msgspec.structs.replace(adapter, versions=[version, wrong]))
    assert registry.find_adapter("style") == adapter


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


def test_a_working_directory_that_is_gone_is_told(run, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "error: the working directory is gone" in run("ls", code=3).err


def test_no_registry(tmp_path, monkeypatch):
    monkeypatch.delenv("STACKCTL_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotFound) as caught:
        Registry.open()
    assert caught.value.hint == "stackctl init"


# -- round trips ----------------------------------------------------------------------------------------------------


def test_every_entry_survives_its_round_trip(registry):
    base = msgspec.structs.replace(
        make_base("big"), revision="1e5", context_length=8192, tied_embeddings=True, path=None
    )
    adapter = Adapter(name="x", description="on: #1\n  two lines\n", versions=[full_version(1), full_version(3)])
    for entry in (base, adapter):
        registry.write(entry)
        assert registry.read(type(entry), entry.name) == entry
    register(registry, "keys")
    stack = save_stack(registry, "s", resolve_expression(registry, "keys:-0.25"))
    assert registry.find_stack("s") == stack
    settings = RegistryFile(current="s", defaults=Defaults(base="on"))
    with registry.settings_after(settings):
        pass
    assert registry.settings() == settings


def test_a_length_below_zero_is_none(registry):
    """Entries of XLNet once had -1, by which its configuration says that it has no longest text."""
    registry.write(make_base("xlnet"))
    path = registry.entry_path(Base, "xlnet")
    path.write_text(path.read_text().replace("context_length: null", "context_length: -1"))
    assert "context_length: -1" in path.read_text()
    assert registry.read(Base, "xlnet").context_length is None


def test_writing_the_same_twice_changes_no_byte(storyteller):
    path = storyteller.entry_path(Stack, "storyteller")
    before = path.read_bytes()
    save_stack(storyteller, "storyteller", resolve_expression(storyteller, "style:0.5+instruct"))
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
    registry.entry_path(Adapter, "style").write_text(HAND_WRITTEN)
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
    path = registry.entry_path(Adapter, "style")
    assert old in HAND_WRITTEN
    path.write_text(HAND_WRITTEN.replace(old, new, 1))
    with pytest.raises(Usage) as caught:
        resolve_expression(registry, "style")
    assert f"{path}, {place}" in caught.value.message
    assert caught.value.hint


def test_a_file_under_another_name(registry):
    register(registry, "style")
    shutil.copy(registry.entry_path(Adapter, "style"), registry.entry_path(Adapter, "copy"))
    with pytest.raises(Usage) as caught:
        resolve_expression(registry, "copy")
    assert "style" in caught.value.message


@pytest.mark.parametrize("versions", [[], [1, 1], [2, 1], [0], [-1]])
def test_versions_out_of_order(registry, versions):
    registry.write(Adapter(name="x", versions=[full_version(abs(number)) for number in versions]))
    if -1 in versions:  # which only somebody's hand can write
        path = registry.entry_path(Adapter, "x")
        path.write_text(path.read_text().replace("version: 1", "version: -1"))
    with pytest.raises(Usage):
        resolve_expression(registry, "x")


def test_files_with_crlf_and_byte_order_mark(storyteller):
    for path in storyteller.root.rglob("*.yaml"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert labels(resolve_expression(storyteller)) == ["style@1:0.5", "instruct@1"]


def test_a_broken_stack_is_an_error_and_not_an_expression(registry):
    register(registry, "a")
    register(registry, "b")
    save_stack(registry, "a+b", resolve_expression(registry, "a+b"))
    registry.entry_path(Stack, "a+b").write_text("schema: 1\nname: [\n")
    with pytest.raises(Usage) as caught:
        resolve_expression(registry, "a+b")
    assert "a+b.yaml" in caught.value.message


def test_other_files_are_no_entries(registry):
    (registry.root / "adapters" / ".tmp-x.yaml").write_text("half")
    (registry.root / "adapters" / ".hidden.yaml").write_text("half")
    (registry.root / "adapters" / "README.md").write_text("x")
    assert registry.names(Adapter) == []
    assert list(registry.adapters()) == []


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["a folder", "a dead link"])
def test_an_entry_that_is_no_file_is_told_as_that(run, tmp_path, make):
    """It was not there, and the hint was its own name."""
    registry = make_registry(tmp_path / "registry")
    register_three(registry)
    path = registry.entry_path(Adapter, "style")
    path.unlink()
    make(path)
    for words in ("inspect style", "rm style", "inspect instruct+style"):
        assert f"error: {path} is no file that can be read" in run(*words.split(), code=2).err
    problems = run("verify", "--json", code=5).json["problems"]
    assert "style" in [problem["what"] for problem in problems]


@pytest.mark.parametrize("what", ["a loop", "a file"])
def test_weights_whose_place_is_no_folder_are_missing(run, tmp_path, what):
    registry = make_registry(tmp_path / "registry")
    register_three(registry)
    place = registry.root / "weights/style/2"
    shutil.rmtree(place)
    place.symlink_to("2") if what == "a loop" else place.write_text("x")
    for words in ("inspect style", "export style --format peft --out out"):
        assert "error: the files of style@2 are missing" in run(*words.split(), code=3).err
    assert "the files of style@2 are missing" in run("verify", code=5).out
    run("gc")
    assert "the files of style@2 are missing" in run("verify", code=5).out
