"""A recipe by itself: the order of its parts, and what an entry says of a version that a recipe would train again."""

from __future__ import annotations

import msgspec
import pytest
from checkpoints import make_registry, register
from hypothesis import given
from hypothesis import strategies as st

from stackctl.core.errors import NotFound, Usage
from stackctl.core.train_job import Recipe, TrainJob
from stackctl.jobs.recipe import build_order, read_recipe
from stackctl.jobs.recipe_plan import plan_recipe


def chain(length: int) -> Recipe:
    """Each part stands on the one that is written after it."""
    parts = {f"a{n}": TrainJob(on=f"a{n + 1}" if n + 1 < length else None, data="x") for n in range(length)}
    return Recipe(train=parts, stacks={"all": "a0"})


def test_a_part_comes_after_all_that_it_stands_on_however_many_those_are():
    assert build_order(chain(5000)) == [f"a{n}" for n in reversed(range(5000))] + ["all"]


@given(st.permutations(range(8)), st.data())
def test_any_order_of_writing_is_brought_into_one_of_building(written, data):
    on = {n: data.draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3)) if n else [] for n in range(8)}
    jobs = {f"a{n}": TrainJob(on="+".join(f"a{m}" for m in on[n]) or None, data="x") for n in written}
    order = build_order(Recipe(train=jobs))
    assert sorted(order) == sorted(jobs)
    assert all(order.index(f"a{m}") < order.index(f"a{n}") for n in on for m in on[n])


@pytest.mark.parametrize("length", [1, 2, 3000])
def test_a_circle_is_named(length):
    recipe = chain(length)
    last = f"a{length - 1}"
    recipe.train[last] = TrainJob(on="a0", data="x")
    with pytest.raises(Usage, match=rf"in a circle: a0 -> .*{last}") as caught:
        build_order(recipe)
    assert caught.value.message.endswith(f"{last} -> a0" if length > 1 else "a0 -> a0")


@pytest.mark.parametrize("settings", [{"rank": None}, {"target_modules": 5}, {"epochs": "many"}, {"rank": 10**18}])
def test_settings_in_an_entry_that_are_none_are_named(tmp_path, settings):
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    adapter = registry.find_adapter("style")
    registry.write(
        msgspec.structs.replace(
            adapter, versions=[msgspec.structs.replace(v, settings=settings) for v in adapter.versions]
        )
    )
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "stackctl.yaml").write_text("base: tiny\ntrain:\n  style: {data: data.jsonl}\n")
    with pytest.raises(Usage, match="style") as caught:
        plan_recipe(read_recipe(tmp_path / "stackctl.yaml"), registry)
    assert caught.value.hint


def test_a_push_of_what_is_nowhere_is_found_before_anything_is_trained(tmp_path):
    registry = make_registry(tmp_path / "registry")
    register(registry, "style")
    (tmp_path / "data.jsonl").write_text('{"text": "x"}\n')
    recipe = tmp_path / "stackctl.yaml"
    text = "base: tiny\ntrain: {{mine: {{data: {}}}}}\nstacks: {{both: mine}}\npush: {{stack: {}, repo: me/x}}\n"
    for target in ("both", "mine", "style+mine:0.5", "style@1"):
        recipe.write_text(text.format("data.jsonl", f"'{target}'"))
        assert [step.name for step in plan_recipe(read_recipe(recipe), registry)] == ["mine", "both"]
    recipe.write_text(text.format("none.jsonl", "both+nosuch"))
    with pytest.raises(NotFound, match=r"none\.jsonl.*'nosuch'"):
        plan_recipe(read_recipe(recipe), registry)
    recipe.write_text(text.format("data.jsonl", "a++b"))
    with pytest.raises(Usage, match=r"a\+\+b"):
        read_recipe(recipe)
