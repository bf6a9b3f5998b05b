"""Names, references and expressions: what is meant, what is refused, and what a plan of it says."""

import shutil
from dataclasses import replace

import msgspec
import pytest
from checkpoints import full_version, labels, make_base, make_registry, register, write_checkpoint

from stackctl.core.errors import Incompatible, NotFound, StackctlError, Usage, VerificationFailed
from stackctl.core.expressions import Reference
from stackctl.core.schema import Adapter, Base, MethodOptions, RegistryFile, Stack
from stackctl.jobs.job_checks import check_is_sum
from stackctl.plan.methods import compose_command
from stackctl.registry.adapters import resolve_adapter
from stackctl.registry.base_entries import remove_base, resolve_base, save_base
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import read_plan
from stackctl.registry.remove import remove_entry
from stackctl.registry.resolve import current_stack, resolve_expression
from stackctl.registry.stacks import save_stack, use_stack
from stackctl.registry.verify import verify_registry
from stackctl.registry.versions import add_version, check_adapter_name

OTHER = "sha256:" + "0" * 64


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["keys", "forward", "lora", "default", "0", "weights", "a.yaml", "x" * 64, "1e5", "null", "on"]
)
def test_names_that_are_words_elsewhere(registry, name):
    register(registry, name)
    assert labels(resolve_expression(registry, name)) == [f"{name}@1"]
    assert labels(resolve_expression(registry, f"{name}@1:2")) == [f"{name}@1:2"]
    assert registry.names(Adapter) == [name]
    save_stack(registry, "s", resolve_expression(registry, f"{name}:0.5"))
    assert registry.find_stack("s").members[0].adapter == name
    assert not read_plan(registry, resolve_expression(registry, "s")).problems
    assert verify_registry(registry)[1] == []
    remove_entry(registry, "s")
    assert remove_entry(registry, name).removed == (f"{name}@1",)


@pytest.mark.parametrize("name", ["../x", "..", "", "base", "X", "a/b", "a\0", "a\n", "x" * 65, "a+b", "a@1", "/tmp/x"])
def test_names_that_are_refused_before_anything_is_written(registry, name):
    before = sorted(registry.root.rglob("*"))
    for act in (
        lambda: check_adapter_name(registry, name),
        lambda: add_version(registry, name, full_version, None),
        lambda: save_base(registry, make_base(name)),
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
    for act in (resolve_expression, remove_entry, use_stack):
        with pytest.raises(StackctlError) as caught:
            act(storyteller, text)
        assert caught.value.exit_code in (2, 3)


def test_a_mistyped_name_hints_at_the_nearest(storyteller):
    for text, near in (
        ("stlye", "style"),
        ("story-teller", "storyteller"),
        ("instruct+stile", "style"),
        ("tinny", "tiny"),
    ):
        with pytest.raises(NotFound) as caught:
            resolve_expression(storyteller, text)
        assert caught.value.exit_code == 3
        assert f"'{near}'" in caught.value.hint
    with pytest.raises(NotFound) as caught:
        resolve_base(storyteller, "tinyy")
    assert "'tiny'" in caught.value.hint
    with pytest.raises(NotFound) as caught:
        use_stack(storyteller, "storytelle")
    assert "'storyteller'" in caught.value.hint


def test_a_missing_version_says_which_there_are(storyteller):
    register(storyteller, "style")
    with pytest.raises(NotFound) as caught:
        resolve_expression(storyteller, "style@7")
    assert "1, 2" in caught.value.message
    assert "style@2" in caught.value.hint


def test_adapters_and_stacks_share_their_names(storyteller):
    with pytest.raises(Usage):
        register(storyteller, "storyteller")
    with pytest.raises(Usage):
        save_stack(storyteller, "style", resolve_expression(storyteller, "style"))
    assert not (storyteller.root / "weights" / "storyteller" / "1").exists()


def test_a_name_with_plus_is_only_ever_its_own_expression(storyteller):
    resolved = resolve_expression(storyteller, "instruct")
    for name in ("style+instruct", "instruct+style", "base+instruct"):
        with pytest.raises(Usage):
            save_stack(storyteller, name, resolved)
    both = resolve_expression(storyteller, "style@1:0.25+instruct")
    assert both.default_name == "style+instruct"
    save_stack(storyteller, both.default_name, both)
    assert labels(resolve_expression(storyteller, "style+instruct")) == ["style@1:0.25", "instruct@1"]
    assert labels(resolve_expression(storyteller, "instruct+style")) == ["instruct@1", "style@1"]


def test_an_expression_longer_than_a_file_name(registry):
    names = [letter * 60 for letter in "abcdef"]
    for name in names:
        register(registry, name)
    text = "+".join(names)
    resolved = resolve_expression(registry, text)
    assert len(resolved.members) == 6
    with pytest.raises(Usage):
        save_stack(registry, resolved.default_name, resolved)
    save_stack(registry, "short", resolved)


# -- resolving ------------------------------------------------------------------------------------------------------


def test_expressions(storyteller):
    assert labels(resolve_expression(storyteller, "style+instruct:0.5")) == ["style@1", "instruct@1:0.5"]
    assert labels(resolve_expression(storyteller, "style:-1")) == ["style@1:-1"]
    assert labels(resolve_expression(storyteller, "style:1e+5+instruct")) == ["style@1:100000", "instruct@1"]
    assert resolve_expression(storyteller, "base").members == ()
    assert resolve_expression(storyteller, "base").base.name == "tiny"
    assert resolve_expression(storyteller, "tiny").members == ()
    assert (
        resolve_expression(storyteller, "base").default_name == resolve_expression(storyteller, "base").pinned == "base"
    )


def test_the_newest_version_is_meant_and_pinned(storyteller):
    register(storyteller, "style", seed=2)
    assert resolve_expression(storyteller, "style").pinned == "style@2"
    assert resolve_expression(storyteller, "style@1").pinned == "style@1"


def test_a_stored_stack_stays_pinned(storyteller):
    register(storyteller, "style", seed=2)
    stack = resolve_expression(storyteller, "storyteller")
    assert labels(stack) == ["style@1:0.5", "instruct@1"]
    assert stack.name == "storyteller"
    assert any("style@2" in note for note in stack.notes)
    assert labels(resolve_expression(storyteller, "style+instruct")) == ["style@2", "instruct@1"]
    save_stack(storyteller, "storyteller", resolve_expression(storyteller, "style:0.5+instruct"))
    assert labels(resolve_expression(storyteller, "storyteller")) == ["style@2:0.5", "instruct@1"]
    assert not resolve_expression(storyteller, "storyteller").notes


def test_named_stacks_inside_expressions_multiply_their_weights(storyteller):
    register(storyteller, "poem")
    assert labels(resolve_expression(storyteller, "storyteller:0.5+poem")) == [
        "style@1:0.25",
        "instruct@1:0.5",
        "poem@1",
    ]
    assert labels(resolve_expression(storyteller, "storyteller:0")) == ["style@1:0", "instruct@1:0"]
    assert labels(resolve_expression(storyteller, "storyteller:-2")) == ["style@1:-1", "instruct@1:-2"]
    save_stack(storyteller, "outer", resolve_expression(storyteller, "storyteller:0.5+poem:2"))
    assert labels(resolve_expression(storyteller, "outer:0.5")) == ["style@1:0.125", "instruct@1:0.25", "poem@1"]


def test_a_stack_inside_an_expression_stays_pinned(storyteller):
    register(storyteller, "style", seed=2)
    register(storyteller, "poem")
    assert labels(resolve_expression(storyteller, "storyteller+poem"))[0] == "style@1:0.5"


def test_products_of_weights_are_finite(storyteller):
    save_stack(storyteller, "big", resolve_expression(storyteller, "style:1e200"))
    with pytest.raises(Usage) as caught:
        resolve_expression(storyteller, "big:1e200")
    assert caught.value.exit_code == 2


def test_a_stack_has_no_versions(storyteller):
    with pytest.raises(Usage):
        resolve_expression(storyteller, "storyteller@1")


def test_a_name_that_is_there_and_no_adapter_is_told_as_what_it_is(storyteller):
    registry = storyteller
    (base,) = registry.names(Base)
    cases = [
        (lambda: remove_entry(registry, "storyteller@1"), Usage, "a stack has no versions", "write storyteller"),
        (
            lambda: resolve_adapter(registry, Reference("storyteller")),
            NotFound,
            "'storyteller' is a stack, and no adapter",
            "stackctl inspect storyteller",
        ),
        (
            lambda: resolve_expression(registry, f"{base}+style"),
            NotFound,
            f"'{base}' is a base, and no adapter or stack",
            "leave it out",
        ),
    ]
    for act, kind, message, hint in cases:
        with pytest.raises(kind, match=message) as caught:
            act()
        assert hint in caught.value.hint
        assert "did you mean" not in caught.value.hint


def test_the_same_adapter_twice_is_a_problem_of_the_plan(storyteller):
    for text in ("style+style", "storyteller+style", "style:0.5+style@1:0.5"):
        with pytest.raises(Incompatible) as caught:
            read_plan(storyteller, resolve_expression(storyteller, text)).check()
        assert "twice" in caught.value.message
    with pytest.raises(Incompatible, match=r"^the adapter 'style' is in the stack 9 times \(style@1\)$"):
        read_plan(storyteller, resolve_expression(storyteller, "+".join(["style"] * 9))).check()


def test_what_no_term_can_say_keeps_its_weights_in_what_is_hinted(storyteller):
    """A method or weights by layer: its members' names alone would be another model."""
    sum_of = resolve_expression(storyteller, "style:0.5")
    save_stack(storyteller, "merged", replace(sum_of, method="ties", options=MethodOptions(density=0.4)))
    with pytest.raises(Incompatible, match="cannot be a term of a sum") as caught:
        resolve_expression(storyteller, "merged:2")
    assert "stackctl export merged" in str(caught.value.hint)
    with pytest.raises(Incompatible, match="only a sum can be trained on") as caught:
        check_is_sum(resolve_expression(storyteller, "merged"))
    assert "stackctl export merged" in str(caught.value.hint)
    merged = storyteller.find_stack("merged")
    assert compose_command(merged, "x") == "stackctl compose style@1:0.5 --method ties --density 0.4 --name x"
    layered = msgspec.structs.replace(merged.members[0], layer_weights={"model.layers.0": 2.0})
    assert compose_command(msgspec.structs.replace(merged, members=[layered]), "x") is None


def test_bases_that_differ(registry):
    save_base(registry, make_base("other", OTHER))
    register(registry, "style")
    register(registry, "far", base="other")
    with pytest.raises(Incompatible) as caught:
        resolve_expression(registry, "style+far")
    assert caught.value.exit_code == 4
    assert "style@1 on tiny" in caught.value.message
    assert "far@1 on other" in caught.value.message
    with pytest.raises(Incompatible):
        resolve_expression(registry, "style", base="other")
    assert resolve_expression(registry, "base", base="other").base.name == "other"
    assert resolve_expression(registry, "far").base.name == "other"


def test_which_base_is_meant(tmp_path):
    empty = make_registry(tmp_path / "a")
    remove_base(empty, "tiny")
    with pytest.raises(NotFound):
        resolve_expression(empty, "base")
    two = make_registry(tmp_path / "b", make_base("one"), make_base("two", OTHER))
    assert resolve_expression(two, "base").base.name == "one"
    remove_base(two, "one")
    assert resolve_expression(two, "base").base.name == "two"
    save_base(two, make_base("three"))
    with two.settings_after(RegistryFile()):
        pass
    with pytest.raises(Usage) as caught:
        resolve_expression(two, "base")
    assert "three, two" in caught.value.message


def test_the_current_stack(storyteller):
    assert current_stack(storyteller) == "storyteller"
    save_stack(storyteller, "second", resolve_expression(storyteller, "style"))
    assert resolve_expression(storyteller).name == "second"
    assert use_stack(storyteller, "storyteller").name == "storyteller"
    assert resolve_expression(storyteller).name == "storyteller"
    remove_entry(storyteller, "storyteller")
    with pytest.raises(Usage):
        resolve_expression(storyteller)


def test_a_stack_on_a_base_that_has_become_another(storyteller):
    storyteller.write(make_base("tiny", OTHER))
    with pytest.raises(Incompatible):
        resolve_expression(storyteller, "storyteller")
    plan = read_plan(storyteller, resolve_expression(storyteller, "style"))
    assert [p.code for p in plan.errors] == ["other_base"]


def test_a_base_that_is_not_registered(storyteller):
    storyteller.entry_path(Base, "tiny").unlink()
    for text in ("style", "storyteller"):
        with pytest.raises(NotFound):
            resolve_expression(storyteller, text)
    assert {p["what"] for p in verify_registry(storyteller)[1]} == {"storyteller", "style@1", "instruct@1"}


def test_the_name_of_a_base_is_of_one_model(registry):
    save_base(registry, make_base())
    with pytest.raises(Usage):
        save_base(registry, make_base("tiny", OTHER))


# -- plans and digests ----------------------------------------------------------------------------------------------


def test_a_plan_of_a_stored_stack(storyteller):
    plan = read_plan(storyteller, resolve_expression(storyteller, "storyteller")).check()
    assert plan.rank == 4
    assert [m.label for m in plan.members] == ["style@1", "instruct@1"]
    assert [p.code for p in plan.problems] == ["foundation"]
    check_digests(storyteller, resolve_expression(storyteller, "storyteller").members)


def test_weights_that_changed(storyteller):
    write_checkpoint(storyteller.root / "weights" / "style" / "1", seed=9)
    with pytest.raises(VerificationFailed) as caught:
        check_digests(storyteller, resolve_expression(storyteller, "storyteller").members)
    assert caught.value.exit_code == 5
    assert "style@1" in caught.value.message
    assert [p["what"] for p in verify_registry(storyteller)[1]] == ["style@1"]
    assert verify_registry(storyteller, {"instruct@1"}) == (1, [])
    assert verify_registry(storyteller, {"style@1"})[1]


def test_weights_that_are_gone(storyteller):
    shutil.rmtree(storyteller.root / "weights" / "style")
    with pytest.raises(NotFound) as caught:
        read_plan(storyteller, resolve_expression(storyteller, "style"))
    assert "style@1" in caught.value.message
    assert [p["what"] for p in verify_registry(storyteller)[1]] == ["style@1"]


def test_weights_that_are_cut_off(storyteller):
    path = storyteller.root / "weights" / "style" / "1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VerificationFailed):
        read_plan(storyteller, resolve_expression(storyteller, "style"))


def test_a_stack_whose_member_was_replaced(storyteller):
    adapter = storyteller.find_adapter("style")
    version = msgspec.structs.replace(adapter.versions[0], digest="sha256:other")
    storyteller.write(msgspec.structs.replace(adapter, versions=[version]))
    with pytest.raises(VerificationFailed):
        resolve_expression(storyteller, "storyteller")


def test_verify_counts_and_reports_everything(storyteller):
    assert verify_registry(storyteller) == (4, [])
    (storyteller.root / "registry.yaml").write_text("schema: 9\n")
    storyteller.entry_path(Base, "tiny").write_text("schema: 1\n")
    storyteller.entry_path(Stack, "storyteller").write_text("[")
    storyteller.entry_path(Adapter, "style").write_text("schema: 1\nname: style\nname: x\n")
    problems = verify_registry(storyteller)[1]
    assert {p["what"] for p in problems} >= {"registry", "tiny", "storyteller", "style", "instruct@1"}
    assert all(p["message"] for p in problems)
