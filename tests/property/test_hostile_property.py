"""Damaged and hostile files, given to the real commands and readers: a sample of what ``make stress`` does for longer.

Whatever a file holds, the outcome is success or an error with its documented exit code, a message and a hint; it comes
in bounded time and memory; no pickle is opened; and nothing outside the registry is touched.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import lora_config, make_base, make_registry, write_checkpoint
from hostile import BOMBS, contain, mutate_json, mutate_safetensors
from hypothesis import given, settings
from hypothesis import strategies as st
from stress.fuzz import make_data, make_template, try_data, try_one
from stress.killing import run_light
from stress.runner import Budget

from stackctl.core.errors import StackctlError, Usage, VerificationFailed
from stackctl.core.expressions import parse_expression, parse_name, parse_stack_name
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.lora.safetensors_header import read_header
from stackctl.plan.build import plan_stack
from stackctl.plan.stack_plan import PlanMember
from stackctl.storage import yaml_text
from stackctl.storage.yaml_text import parse_yaml

CHANCE = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "template"
    make_template(folder)
    return folder


@pytest.mark.parametrize("seed", range(3))
def test_whatever_a_file_holds_a_command_says_what_is_wrong_and_touches_nothing(
    template: Path, tmp_path: Path, seed: int
) -> None:
    budget = Budget(0.0, tmp_path, random.Random(seed))
    assert [wrong for _ in range(10) for wrong in try_one(template, tmp_path / "place", budget, 10_000)[1]] == []


def test_whatever_a_data_file_holds(tmp_path: Path) -> None:
    whole, budget = make_data(tmp_path), Budget(0.0, tmp_path, random.Random(0))
    assert [wrong for _ in range(20) for wrong in try_data(whole, tmp_path, budget)[1]] == []


@pytest.mark.parametrize("bomb", range(len(BOMBS)))
@pytest.mark.parametrize("name", ["registry/adapters/style.yaml", "new/adapter_config.json"])
def test_few_kinds_of_bytes_and_many_of_them(template: Path, tmp_path: Path, bomb: int, name: str) -> None:
    place = shutil.copytree(template, tmp_path / "place")
    (place / name).write_bytes(BOMBS[bomb](100_000))
    arguments = ["inspect", "style"] if name.endswith("yaml") else ["inspect", "./new"]
    ended = run_light(arguments, place, prepare=contain)
    assert ended.code in (2, 4), ended.said
    assert len(ended.said) < 2000


@given(CHANCE)
@settings(max_examples=60)
def test_a_header_that_is_read_tells_where_the_bytes_are(tmp_path_factory: Any, chance: random.Random) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("header"))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(mutate_safetensors(path.read_bytes(), chance))
    try:
        tensors = read_header(path)
    except VerificationFailed:
        return
    assert sum(t.end - t.start for t in tensors.values()) <= path.stat().st_size
    assert all(8 <= t.start <= t.end <= path.stat().st_size for t in tensors.values())


@given(CHANCE)
@settings(max_examples=60)
def test_a_configuration_is_planned_or_refused(tmp_path_factory: Any, chance: random.Random) -> None:
    folder = write_checkpoint(tmp_path_factory.mktemp("config"))
    path = folder / "adapter_config.json"
    path.write_bytes(mutate_json(path.read_bytes(), chance))
    try:
        plan_stack(make_base(), [PlanMember("x", 1.0, read_checkpoint(folder), "x")])
    except StackctlError as error:
        assert error.exit_code in (4, 5)
        assert error.hint


@given(st.text(alphabet="ab:-[]{}&*!|>'\"#,?% \n\t0.~é<=\r\ufeff\0", max_size=60))
@settings(max_examples=200)
def test_yaml_is_a_value_or_an_error_with_its_place(text: str) -> None:
    try:
        parse_yaml(text, "file.yaml")
    except Usage as error:
        assert "line" in error.message
        assert error.hint


@pytest.mark.parametrize(
    "make",
    [
        lambda number: "- x\n" * number,
        lambda number: f"a: [{'x, ' * number}]",
        lambda number: "".join(f"k{n}: x\n" for n in range(number)),
        lambda number: "- [[]]\n" * (number // 2),
    ],
)
def test_yaml_of_more_values_than_a_file_has(monkeypatch: pytest.MonkeyPatch, make: Callable[[int], str]) -> None:
    """Each costs memory, however few bytes it has in the file."""
    monkeypatch.setattr(yaml_text, "MOST_VALUES", 1000)
    assert parse_yaml(make(600), "f").value
    with pytest.raises(Usage, match="more than 1,000 values"):
        parse_yaml(make(1100), "f")


@given(st.text(max_size=8) | st.from_regex(r"[a-z0-9._+@:/\\~-]{0,80}", fullmatch=True))
@settings(max_examples=300)
def test_a_name_is_one_part_of_a_path_on_every_file_system(text: str) -> None:
    """Also where case does not count, and where Unicode is written in another form than it was given in."""
    for parse in (parse_name, parse_stack_name):
        try:
            name = parse(text)
        except Usage as error:
            assert error.hint
            continue
        path = Path("/root") / f"{name}.yaml"
        assert path.parent == Path("/root") and path.name == f"{name}.yaml"
        assert name.isascii() and name == name.lower() and not name.startswith(".") and len(path.name) < 256
    try:
        terms = parse_expression(text)
    except Usage as error:
        assert error.hint
        return
    assert all(parse_name(term.reference.name) for term in terms)


def test_what_a_newer_peft_wrote_is_said_with_its_version(run: Any, tmp_path: Path) -> None:
    make_registry(tmp_path / "registry")
    folder = write_checkpoint(tmp_path / "new", lora_config(peft_version="9.1", use_surprise=True))
    said = run("add", "x", folder, code=4).err
    assert "PEFT 9.1" in said
    assert "'use_surprise'" in said
    assert "up to 0.21" in said
