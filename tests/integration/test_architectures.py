"""A sample of the kinds of models there are, as ``python -m tests.stress.architectures`` takes all of them."""

import sys

import pytest
from architectures import model_types
from stress.architectures import PAGE, Look, Refused

RIGHT = [
    "deepseek_v3", "falcon_h1", "gemma3", "gpt_oss", "llama4_text", "mamba", "phimoe", "qwen3_next", "roberta", "xlnet",
    "zamba2",
]  # fmt: skip
"""Layers that PEFT turns into parameters, forbids, or matches by a short name; a tower that sees; experts stored the
other way round; routers that are no linear layers; positions that begin elsewhere; a block that layers share."""


@pytest.fixture
def look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["stackctl"])
    return lambda model_type: Look(model_type, tmp_path)


@pytest.mark.parametrize("model_type", RIGHT)
def test_from_base_add_to_generate_as_plain_peft_does(look, model_type):
    look(model_type).do()


def test_what_cannot_be_trained_is_refused_in_the_dry_run(look):
    reformer = look("reformer")
    with pytest.raises(Refused, match="512 tokens"):
        reformer.do()
    assert reformer.step == "dry run"


def test_the_page_names_every_type_once():
    named = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    right = PAGE.read_text().partition("## Right")[2].partition("## ")[0]
    named += right.replace("`", "").replace("\n", " ").replace(",", " ").split()
    assert sorted(named) == sorted(model_types())
    assert "this is a bug" not in PAGE.read_text()
