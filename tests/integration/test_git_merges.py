"""A registry under git: two branches that gave one number to two things, and files that go away meanwhile."""

from __future__ import annotations

import json
import shutil

import msgspec
import pytest
from checkpoints import register, write_checkpoint

from stackctl.core.provenance import Run
from stackctl.core.schema import AdapterInfo, CheckpointMember


@pytest.fixture
def merged(filled_registry, tmp_path):
    """Both branches made style@2; the other side's weights are in ``theirs``, this side's in their place."""
    path = filled_registry.root / "adapters" / "style.yaml"
    before = path.read_text()
    register(filled_registry, "style", seed=21)
    theirs = path.read_text()
    (filled_registry.root / "weights" / "style" / "2").rename(tmp_path / "theirs")
    path.write_text(before)
    register(filled_registry, "style", seed=22)
    before, mark, ours = path.read_text().partition("- version: 2")
    assert theirs.startswith(before + mark)
    theirs = theirs.removeprefix(before)
    ours = mark + ours
    path.write_text(f"{before}<<<<<<< HEAD\n{ours}=======\n{theirs}>>>>>>> other\n")
    return before + ours


def test_a_conflict_is_named_and_what_to_do_is_what_helps(filled_registry, merged, fails, run, tmp_path):
    path = filled_registry.root / "adapters" / "style.yaml"
    line = path.read_text()[: path.read_text().index("<<<<<<<")].count("\n") + 1
    for words in ("ls", "inspect style", "add style theirs --base tiny", "gc", "rm style@1"):
        said = fails(*words.split(), code=2)
        assert f"{path}, line {line}: an unresolved merge conflict | keep one side" in said
        assert f"git checkout --ours {path}; stackctl add style DIR" in said
    assert "an unresolved merge conflict" in run("verify", code=5).out
    path.write_text(merged)
    assert run("add", "style", tmp_path / "theirs", "--base", "tiny", "-q").out == "style@3\n"
    assert [p for p in run("verify", "--json", code=5).json["problems"] if p["what"].startswith("style")] == []


def test_both_sides_kept_under_one_number_are_refused(filled_registry, merged, fails):
    path = filled_registry.root / "adapters" / "style.yaml"
    marks = ("<" * 7, "=" * 7, ">" * 7)
    path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith(marks)))
    assert "distinct and ascending | give each a number of its own" in fails("ls", code=2)


def test_a_stack_of_the_other_side_is_an_error_and_never_another_model(filled_registry, merged, fails, run, tmp_path):
    path = filled_registry.root / "adapters" / "style.yaml"
    path.write_text(merged)
    run("compose", "style@2", "--name", "ours")
    entry = filled_registry.root / "stacks" / "ours.yaml"
    digest = filled_registry.find_stack("ours").members[0].digest
    entry.write_text(entry.read_text().replace(digest, "sha256:" + "7" * 64))
    assert "style@2" in fails("inspect", "ours", code=5)


def trained(filled_registry, foundation_digest):
    """instruct@2 as training would have made it, on a style@1 with some digest."""
    version = register(filled_registry, "instruct", ["style@1"], seed=31)
    member = CheckpointMember(adapter="style", version=1, digest=foundation_digest)
    info = AdapterInfo(
        adapter="instruct", version=2, base="tiny", base_fingerprint=version.fingerprint, trained_on=[member]
    )
    (filled_registry.root / version.path / "adapter_info.json").write_text(json.dumps(msgspec.to_builtins(info)))
    run = Run(steps=1, epochs=1, loss=1, tokens=1, supervised_tokens=1, seconds=1, frozen="fold")
    adapter = filled_registry.find_adapter("instruct")
    versions = [msgspec.structs.replace(v, run=run) if v.version == 2 else v for v in adapter.versions]
    filled_registry.write(msgspec.structs.replace(adapter, versions=versions))


def test_what_was_trained_on_another_version_of_that_number_is_found(filled_registry, run):
    trained(filled_registry, "sha256:" + "7" * 64)
    (problem,) = [p for p in run("verify", "--json", code=5).json["problems"] if p["what"] == "instruct@2"]
    assert problem["message"] == "instruct@2 was trained on another style@1 than the one that is here now"
    assert problem["restore"] is None


def test_what_was_trained_on_what_is_here_is_right(filled_registry, run):
    trained(filled_registry, filled_registry.find_adapter("style").newest().digest)
    assert [p for p in run("verify", "--json", code=5).json["problems"] if p["what"].startswith("instruct")] == []


def test_registry_yaml_is_removed_while_somebody_works(filled_registry, run, monkeypatch, tmp_path):
    """Found when the command began, gone when it wants to write: nothing is written, and init brings it back."""
    write_checkpoint(tmp_path / "new", seed=41)
    lock, entries = type(filled_registry).lock, sorted(p.read_bytes() for p in filled_registry.root.glob("*/*.yaml"))

    def gone(self):
        (self.root / "registry.yaml").unlink(missing_ok=True)
        return lock(self)

    with monkeypatch.context() as patch:
        patch.setattr(type(filled_registry), "lock", gone)
        ran = run("add", "new", "new", "--base", "tiny", code=3)
    assert (
        ran.err == f"error: {filled_registry.root}/registry.yaml is gone\nhint: stackctl init {filled_registry.root}\n"
    )
    assert sorted(p.read_bytes() for p in filled_registry.root.glob("*/*.yaml")) == entries
    assert not list(filled_registry.root.glob("**/.tmp-*"))
    run("init", filled_registry.root)
    assert run("add", "new", "new", "--base", "tiny", "-q").out == "new@1\n"


def test_a_registry_that_was_moved_is_the_same_registry(filled_registry, run, tmp_path):
    run("compose", "style+instruct", "--name", "both")
    write_checkpoint(tmp_path / "elsewhere", seed=51)
    run("add", "linked", tmp_path / "elsewhere", "--base", "tiny", "--link")
    before = run("ls", "--json").json
    (tmp_path / "a b").mkdir()
    shutil.move(filled_registry.root, tmp_path / "a b" / "régistre")
    after = run("ls", "--registry", tmp_path / "a b" / "régistre", "--json").json
    assert [a["name"] for a in after["adapters"]] == [a["name"] for a in before["adapters"]]
    problems = run("verify", "--registry", tmp_path / "a b" / "régistre", "--json", code=5).json["problems"]
    assert {p["what"] for p in problems} == {"linked@1", "tiny", "other"}, "what lies outside is found from inside"
