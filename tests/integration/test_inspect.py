"""What ``inspect`` and ``doctor`` show of things that are there, and what they say of what is wrong with them."""

from __future__ import annotations

import msgspec
from checkpoints import write_checkpoint


def test_modules_are_a_table_and_the_same_in_json(filled_registry, run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    rows = run("inspect", "style+tone", "--modules", "--json").json["module_table"]
    screen = run("inspect", "style+tone", "--modules").out
    assert rows and all(row["module"] in screen for row in rows)
    for row in rows:
        assert row["rank"] == sum(member["rank"] for member in row["members"])
        assert {member["member"] for member in row["members"]} <= {"style@1", "tone@1"}


def test_a_note_beside_a_checkpoint_is_shown_and_one_that_is_no_json_is_a_warning(filled_registry, run, tmp_path):
    folder = write_checkpoint(tmp_path / "elsewhere")
    (folder / "adapter_info.json").write_text('{"adapter": "mine"}')
    assert run("inspect", folder, "--json").json["info"] == {"adapter": "mine"}
    (folder / "adapter_info.json").write_text("{")
    problems = run("inspect", folder, "--json").json["problems"]
    assert ("info", "warning") in {(problem["code"], problem["severity"]) for problem in problems}


def test_a_folder_has_no_members_to_interfere(filled_registry, fails, tmp_path):
    folder = write_checkpoint(tmp_path / "elsewhere")
    assert "between the members of a stack" in fails("inspect", folder, "--interference", code=2)


def test_the_weights_by_layer_of_a_stack_are_counted_in_its_tree(filled_registry, run):
    run("compose", "style+tone", "--name", "duo")
    stack = filled_registry.find_stack("duo")
    weights = {f"model.layers.{layer}": 0.5 for layer in (0, 1)}
    first = msgspec.structs.replace(stack.members[0], layer_weights=weights)
    filled_registry.write(msgspec.structs.replace(stack, members=[first, *stack.members[1:]]))
    assert "(2 weights by layer)" in run("inspect", "duo").out


def test_doctor_tells_of_a_registry_whose_settings_cannot_be_read(filled_registry, run):
    (filled_registry.root / "registry.yaml").write_text("schema: 1\nnosuch: 2\n")
    ran = run("doctor", "--json", code=1)
    assert [problem["what"] for problem in ran.json["problems"]] == ["registry"]
    assert "nosuch" in run("doctor", code=1).out
