"""Which base a checkpoint belongs to, by what it says of itself."""

from __future__ import annotations

import pytest
from checkpoints import make_base
from msgspec.structs import replace

from stackctl.core.errors import Incompatible, NotFound
from stackctl.core.schema import AdapterInfo, Defaults, RegistryFile
from stackctl.registry.base_matching import StatedBase, choose_base, is_called, recognise_base
from stackctl.registry.base_models import converted_folder
from stackctl.registry.store import Registry


@pytest.fixture
def bases(tmp_path):
    """A registry with two bases of one shape: ``mine``, in a folder, and ``theirs``, from the Hub."""
    found = [
        replace(make_base("mine", "sha256:1"), kind="folder", source="../model", path="../model", hub_id=None),
        replace(make_base("theirs", "sha256:2"), kind="hub", source="them/model", path=None, hub_id="them/model"),
    ]
    registry = Registry(tmp_path / "registry")
    registry.bases = lambda: iter(found)
    registry.find_base = lambda name: next((base for base in registry.bases() if base.name == name), None)
    registry.names = lambda _: [base.name for base in registry.bases()]
    registry.settings = lambda: RegistryFile(current=None, defaults=Defaults(base="theirs"))
    (tmp_path / "model").mkdir()
    return registry


def stated(name, own=None):
    return StatedBase.of({"base_model_name_or_path": name}, own)


def info(fingerprint):
    return AdapterInfo(adapter="style", version=1, base="x", base_fingerprint=fingerprint)


def test_by_its_name_on_the_hub_or_its_folder(bases, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "model")
    for name, wanted in {
        "them/model": "theirs", str(tmp_path / "model"): "mine", str(tmp_path / "link"): "mine",
        f"{tmp_path}/registry/../model/": "mine",
    }.items():  # fmt: skip
        found = recognise_base(bases, stated(name))
        assert found and found.name == wanted


def test_a_fingerprint_counts_for_more_than_a_name(bases):
    assert recognise_base(bases, stated("them/model", info("sha256:1"))).name == "mine"
    assert recognise_base(bases, stated("them/model", info("sha256:3"))) is None
    assert recognise_base(bases, stated("them/model", info(""))).name == "theirs"


def test_of_two_that_are_the_same_model_the_default_one(bases):
    first, second = bases.bases()
    bases.bases = lambda: iter([replace(first, fingerprint=second.fingerprint), second])
    assert recognise_base(bases, stated(None, info(second.fingerprint))).name == "theirs"


@pytest.mark.parametrize(
    ("here", "name", "own", "wanted"),
    [
        ("mine theirs", "them/model", None, ("theirs", "")),
        ("mine theirs", "", None, ("theirs", "")),
        ("mine theirs", "mine", None, ("mine", "")),
        ("mine theirs", "org/other", None, NotFound),
        ("theirs", "org/other", None, NotFound),
        ("mine", "org/other", None, ("mine", "org/other")),
        ("mine", "org/other", "sha256:1", ("mine", "")),
        ("mine", "org/other", "sha256:3", NotFound),
        ("mine theirs", "them/model", "sha256:3", Incompatible),
        ("mine theirs", "mine", "sha256:2", ("theirs", "")),
        ("", "org/other", None, NotFound),
        ("", "", None, NotFound),
    ],
)
def test_the_base_is_the_one_that_is_stated_or_the_only_folder_here(bases, here, name, own, wanted):
    found = [base for base in bases.bases() if base.name in here.split()]
    bases.bases = lambda: iter(found)
    asked = StatedBase.of({"base_model_name_or_path": name}, info(own) if own else None)
    if isinstance(wanted, tuple):
        base, unknown = choose_base(bases, asked, lambda: None)
        assert (base.name, unknown) == wanted
    else:
        with pytest.raises(wanted) as caught:
            choose_base(bases, asked, lambda: None)
        assert caught.value.hint


@pytest.mark.parametrize("name", ["me/model", "", None, 7, ["them/model"], "/a\0b", "\ud800", "x" * 10_000])
def test_whatever_else_a_configuration_says_is_no_base_of_these(bases, name):
    assert recognise_base(bases, stated(name)) is None


def test_what_a_gguf_file_was_converted_to_is_its_base_s_folder(bases, tmp_path, monkeypatch):
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    base = replace(make_base("small"), kind="gguf", source="../model.gguf", path=None, hub_id=None)
    folder = converted_folder(tmp_path / "model.gguf")
    assert is_called(base, str(folder), bases)
    assert not is_called(base, str(folder.with_name("gguf-0")), bases)
    (tmp_path / "model.gguf").unlink()
    assert not is_called(base, str(folder), bases)


def test_links_in_a_circle_are_nobodys_folder(bases, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert not is_called(next(bases.bases()), str(tmp_path / "a"), bases)
