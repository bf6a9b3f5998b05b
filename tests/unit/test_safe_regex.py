"""Expressions of other people's: they mean what ``re`` says, and none takes for ever."""

import re

import pytest
from checkpoints import lora_config, make_base, make_registry, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from stackctl.core.errors import Incompatible
from stackctl.lora.safe_regex import pattern

NAME = "model.layers.0.self_attn.q_proj"


@given(
    st.from_regex(r"[a-c.]{0,4}(\([ab]\|c\))?[a-c]?[*+?]?[a-c.\\d]{0,3}", fullmatch=True), st.text("abc.0", max_size=9)
)
def test_they_match_what_re_matches(text, name):
    try:
        wanted = re.fullmatch(text, name) is not None
    except re.error:
        with pytest.raises(re.error):
            pattern(text)
        return
    assert pattern(text).fullmatch(name) == wanted
    assert bool(pattern(text).match(name)) == (re.match(text, name) is not None)


@pytest.mark.parametrize("hostile", [r"(\w+\.?)+(\w+\.?)+!", r"(?:\w|\w\w|\.)*m$", r"((\w|\.)+)+!"])
def test_what_would_take_years_is_refused(hostile, monkeypatch):
    monkeypatch.setattr("stackctl.lora.safe_regex._SECONDS", 0.2)
    long = pattern.__wrapped__(hostile)  # no other test has one that was given less time
    with pytest.raises(Incompatible, match="takes for ever"):
        long.fullmatch(f"{NAME}.and.more.of.it.to.go.through" * 3)
    with pytest.raises(Incompatible, match="takes for ever"):  # and it is not given its time anew
        long.fullmatch(f"{NAME}.and.more.of.it.to.go.through" * 3)


def test_a_checkpoint_with_one_is_refused_at_add(run, tmp_path, monkeypatch):
    monkeypatch.setattr("stackctl.lora.safe_regex._SECONDS", 0.2)
    make_registry(tmp_path / "registry", make_base())
    hostile = write_checkpoint(tmp_path / "hostile", config=lora_config(target_modules=r"(\w+\.?)+(\w+\.?)+!"))
    ran = run("add", "hostile", hostile, code=4)
    assert "takes for ever to match" in ran.err
    assert run("ls", "--json").json["adapters"] == []


def test_an_expression_that_would_grow_beyond_memory_is_only_compiled(run, tmp_path):
    make_registry(tmp_path / "registry", make_base())
    large = write_checkpoint(tmp_path / "large", config=lora_config(target_modules="((a{1000}){1000}){1000}"))
    run("add", "large", large, code=4)
