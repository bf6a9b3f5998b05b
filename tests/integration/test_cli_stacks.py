"""Expressions, compose and inspect."""

from __future__ import annotations

import shutil

import pytest
from checkpoints import lora_config, lora_tensors, register, write_checkpoint

from stackctl.registry.base_entries import resolve_base


def members(document):
    return [(m["adapter"], m["version"], m["weight"]) for m in document["members"]]


def test_compose_tells_its_keys(filled_registry, run):
    found = run("compose", "style:0.7+instruct@1", "--name", "storyteller", "--json").json
    assert {"schema", "stack", "base", "members", "method", "exact", "rank"} <= set(found)
    assert (found["stack"], found["base"], found["method"], found["exact"]) == ("storyteller", "tiny", "sum", True)
    assert found["rank"] == 4
    for member in found["members"]:
        assert {"adapter", "version", "digest", "weight", "rank"} <= set(member)
        assert member["digest"].startswith("sha256:")
    assert members(found) == [("style", 1, 0.7), ("instruct", 1, 1.0)]
    assert run("compose", "style+tone", "--name", "duo", "-q").out == "duo\n"


def test_a_stack_without_a_name_is_called_by_its_names(filled_registry, run):
    assert run("compose", "style@1:0.5+tone:-1", "--json").json["stack"] == "style+tone"
    assert run("inspect", "--json").json["stack"] == "style+tone"
    assert members(run("inspect", "style+tone", "--json").json) == [("style", 1, 0.5), ("tone", 1, -1)]
    assert (filled_registry.root / "stacks" / "style+tone.yaml").is_file()
    assert run("use", "style+tone", "-q").out == "style+tone\n"
    assert run("rm", "style+tone", "-q").out == "style+tone\n"


def test_a_dry_run_writes_nothing(filled_registry, run):
    before = {path: path.read_bytes() for path in filled_registry.root.rglob("*") if path.is_file()}
    found = run("compose", "style+tone", "--dry-run", "--json").json
    assert members(found) == [("style", 1, 1.0), ("tone", 1, 1.0)]
    assert {path: path.read_bytes() for path in filled_registry.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("words", [("style:0.5",), ("style+tone", "--name", "instruct"), ("style", "--name", "a+b")])
def test_a_dry_run_promises_no_name_that_cannot_be_had(filled_registry, fails, words):
    assert fails("compose", *words, "--dry-run", code=2) == fails("compose", *words, code=2)


@pytest.mark.parametrize("weight", ["0", "-0.5", "1e-3", "1e+1"])
def test_a_weight_may_be_any_finite_number(filled_registry, run, weight):
    found = run("compose", f"style:{weight}+tone", "--name", "duo", "--json").json
    assert members(found)[0] == ("style", 1, float(weight))
    assert members(run("inspect", "duo", "--json").json)[0][2] == float(weight)


@pytest.mark.parametrize("text", ["", "+style", "style:nan", "style@0", "base+style", "style tone"])
def test_what_is_no_expression_is_2(filled_registry, fails, text):
    fails("compose", "--", text, code=2)
    fails("inspect", "--", text, code=2)
    fails("train", "x", f"--on={text or ' '}", "--data", "x.jsonl", code=2)


def test_the_same_adapter_twice_is_an_error_that_names_it(filled_registry, run, fails):
    register(filled_registry, "style", seed=8)
    for text in ("style+style", "style@1+style@2", "style+instruct+style:0.5"):
        assert "style" in fails("compose", text, "--name", "x", code=4)
    run("compose", "style+instruct", "--name", "storyteller")
    assert "style" in fails("compose", "storyteller+style", "--name", "x", code=4)


def test_unlike_bases_are_an_error_that_names_the_members(filled_registry, fails):
    said = fails("compose", "style+foreign", code=4)
    assert all(word in said for word in ("style@1", "tiny", "foreign@1", "other"))
    fails("compare", "style", "foreign", "-p", "x", code=4)
    fails("compose", "style", "--name", "x", "--base", "other", code=4)


def test_a_named_stack_is_a_term_and_its_weights_are_multiplied(filled_registry, run):
    run("compose", "style:0.5+instruct:2", "--name", "inner")
    found = run("compose", "inner:0.5+tone", "--name", "outer", "--json").json
    assert members(found) == [("style", 1, 0.25), ("instruct", 1, 1.0), ("tone", 1, 1.0)]
    deeper = run("compose", "outer:2", "--name", "deeper", "--json").json
    assert members(deeper) == [("style", 1, 0.5), ("instruct", 1, 2.0), ("tone", 1, 2.0)]


def test_a_stack_has_no_versions(filled_registry, run, fails):
    run("compose", "style+tone", "--name", "duo")
    fails("inspect", "duo@1", code=2)


def test_the_newest_version_is_meant_and_what_was_resolved_is_pinned(filled_registry, run):
    register(filled_registry, "style", seed=8)
    found = run("compose", "style+tone", "--name", "duo", "--json").json
    assert members(found)[0] == ("style", 2, 1.0)
    register(filled_registry, "style", seed=9)
    assert members(run("inspect", "duo", "--json").json)[0] == ("style", 2, 1.0)
    assert "style@2" in run("inspect", "duo").out


def test_text_that_is_a_stored_stacks_name_means_it_as_pinned_with_a_note(filled_registry, run):
    run("compose", "style:0.5+tone")
    register(filled_registry, "style", seed=8)
    ran = run("inspect", "style+tone", "--json")
    assert members(ran.json) == [("style", 1, 0.5), ("tone", 1, 1.0)]
    assert "style@2" in ran.err
    other = run("inspect", "tone+style", "--json")  # any other expression is resolved afresh
    assert members(other.json) == [("tone", 1, 1.0), ("style", 2, 1.0)]
    assert "newer" not in other.err


def test_composing_again_takes_the_newer_versions(filled_registry, run):
    run("compose", "style:0.5+tone")
    register(filled_registry, "style", seed=8)
    found = run("compose", "style+tone", "--json").json
    assert members(found) == [("style", 2, 1.0), ("tone", 1, 1.0)]
    assert members(run("inspect", "style+tone", "--json").json) == [("style", 2, 1.0), ("tone", 1, 1.0)]
    assert "note" not in run("inspect", "style+tone", "--json").err


def test_a_plus_in_a_name_must_be_the_expressions_own(filled_registry, run, fails):
    fails("compose", "style+tone", "--name", "style+instruct", code=2)
    assert run("compose", "style:2+tone", "--name", "style+tone", "-q").out == "style+tone\n"
    fails("compose", "base", code=2)
    assert run("compose", "base", "--base", "tiny", "--name", "plain", "--json").json["members"] == []


def test_every_name_that_is_missing_is_named(filled_registry, fails):
    told = fails("compose", "styel+nosuch+instruct@7", code=3)
    assert all(word in told for word in ("styel", "nosuch", "instruct@7", "did you mean 'style'"))


# -- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_tells_what_each_thing_is(filled_registry, run, tmp_path):
    run("compose", "style+instruct", "--name", "storyteller")
    folder = write_checkpoint(tmp_path / "somewhere")
    for what, kind in (
        ("style", "adapter"), ("style@1", "adapter"), ("storyteller", "stack"), ("style+tone", "expression"),
        ("style:0.5", "expression"), ("tiny", "base"), (str(folder), "checkpoint"), ("./somewhere", "checkpoint"),
    ):  # fmt: skip
        found = run("inspect", what, "--json").json
        assert found["schema"] == 1
        assert found["kind"] == kind
        assert found["problems"] == []
        assert run("inspect", what).out
    assert run("inspect", "base", "--base", "tiny", "--json").json["kind"] == "base"
    assert run("inspect", "--json").json["stack"] == "storyteller"


def test_inspect_lists_every_problem_and_still_ends_well(filled_registry, run, tmp_path):
    found = run("inspect", "style+style", "--json").json
    assert found["problems"]
    assert {"message", "hint", "severity"} <= set(found["problems"][0])
    warned = run("inspect", "instruct+tone", "--json").json["problems"]
    assert [p["severity"] for p in warned] == ["warning"]
    assert "style@1" in warned[0]["message"]


def test_a_folder_is_held_against_the_base_that_it_names_or_that_is_asked_for(filled_registry, run, fails, tmp_path):
    """What ``add`` would say, ``inspect`` says before."""
    tensors = lora_tensors()
    del tensors[next(name for name in tensors if "lora_A" in name)]
    del tensors[next(name for name in tensors if "lora_B" in name)]
    folder = write_checkpoint(tmp_path / "somewhere", lora_config(), tensors)
    found = run("inspect", folder, "--json").json
    assert (found["checked_on"], found["problems"]) == (None, [])
    found = run("inspect", folder, "--base", "tiny", "--json").json
    assert found["checked_on"] == "tiny"
    assert [p["code"] for p in found["problems"]] == ["missing_tensors"]
    assert found["problems"][0]["message"].partition(": ")[2] in fails("add", "style", folder, "--base", "tiny", code=4)
    base = resolve_base(filled_registry, "tiny")
    write_checkpoint(folder, lora_config(base_model_name_or_path=base.hub_id or base.source), tensors)
    assert run("inspect", folder, "--json").json["checked_on"] == "tiny"
    fails("inspect", folder, "--base", "nosuch", code=3)


def test_a_folder_that_is_called_like_an_adapter_does_not_hide_it(filled_registry, run, tmp_path):
    write_checkpoint(tmp_path / "style")
    write_checkpoint(tmp_path / "unknown")
    assert run("inspect", "style", "--json").json["kind"] == "adapter"
    assert run("inspect", "./style", "--json").json["kind"] == "checkpoint"
    assert run("inspect", "unknown", "--json").json["kind"] == "checkpoint"
    shutil.rmtree(filled_registry.root)
    assert run("inspect", "style", "--json").json["kind"] == "checkpoint"


def test_paths_in_json_are_absolute(filled_registry, run, tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "somewhere")
    assert run("inspect", "./somewhere", "--json").json["path"] == str(tmp_path / "somewhere")
    monkeypatch.chdir(tmp_path / "registry" / "adapters")
    found = run("inspect", "style", "--registry", "..", "--json").json
    assert found["path"] == str(filled_registry.root / "weights" / "style" / "1")


def test_inspect_verify_rehashes(filled_registry, run, fails):
    assert run("inspect", "style", "--verify", "--json").json["verified"] is True
    config = filled_registry.root / "weights" / "style" / "1" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    fails("inspect", "style", "--verify", code=5)
