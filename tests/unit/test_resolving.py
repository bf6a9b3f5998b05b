"""Names, references and expressions: what is meant, what is refused, and what a plan of it says."""

import shutil

import msgspec
import pytest
from checkpoints import full_version, make_base, make_registry, register, write_checkpoint

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage, VerificationFailed
from stackctl.core.schema import Adapter, Base, RegistryFile, Stack

OTHER = "sha256:" + "0" * 64


pytestmark = pytest.mark.usefixtures("no_power_cuts")


def labels(stack):
    return [str(member) for member in stack.members]


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
