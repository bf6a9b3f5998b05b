"""What the id of a repository on the Hub is: everywhere the same, and as huggingface_hub has it."""

import subprocess

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from stackctl.core.errors import StackctlError
from stackctl.core.hub_ids import is_hub_id, is_ref_name, parse_dataset_id
from stackctl.hub.repos import parse_repo
from stackctl.jobs.job import data_path
from stackctl.registry.base_models import parse_source

IDS = ("org/data-v1.5", "me/storyteller", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b", "_a/b_", "0/1")
NO_IDS = (
    "data",
    "a/b/c",
    "./a",
    "../a",
    "/a",
    "a/",
    "~/a",
    "a/b--c",
    "a/b..c",
    "a/b.git",
    "-a/b",
    "a/b-",
    "ä/b",
    "a /b",
)


def _hub_says(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


@given(st.text("ab/._-0é: ", max_size=12) | st.from_regex(r"\A[\w.-]{1,98}/[\w.-]{1,98}\Z"))
@example("a" * 96 + "/b")
@example("a" * 97 + "/b")
@example("a/" + "b" * 97)
@example("a/b\n")
def test_an_id_is_what_huggingface_hub_takes(text):
    assert is_hub_id(text) == _hub_says(text)


@pytest.mark.parametrize("text", IDS)
def test_an_id_is_taken_wherever_one_is_read(text):
    assert is_hub_id(text)
    assert parse_repo(f"https://huggingface.co/{text}") == text
    assert parse_source("mine", text) == ("hub", text)
    assert data_path(text, None, "style") == text
    assert data_path(f"{text}:train[:10%]", None, "style") == f"{text}:train[:10%]"
    assert parse_dataset_id(f"{text}:test") == (text, "test")


@pytest.mark.parametrize("text", NO_IDS)
def test_no_id_is_refused_wherever_one_is_read(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(text)
    assert parse_dataset_id(text) is None
    for read in (parse_repo, lambda text: parse_source("mine", text), lambda text: data_path(text, None, "style")):
        with pytest.raises(StackctlError):
            read(text.rstrip("/") if text == "a/" else text)


@pytest.mark.parametrize("text", ["data/chat.jsonl", "data/chat.PARQUET", "data/chat.yaml", "data/chat.jsonl:train"])
def test_what_ends_as_a_file_is_no_data_set(text):
    assert parse_dataset_id(text) is None


REFS = ("main", "v1.0", "dev/branch", "refs/pr/3", "é", "a@b", "a-", "a.b", "@a", "a{b", "x.lockx")
NO_REFS = ("", "@", "a b", "a..b", "a.", "a.lock", "a.lock/b", ".a", "a/.b", "a//b", "/a", "a/", "a~1", "a^", "a:b")
NO_REFS += ("a?", "a*", "a[", "a\\b", "a@{1}", "a\tb", "a\x7f")


@pytest.mark.parametrize("text", REFS + NO_REFS)
def test_a_branch_or_a_tag_is_called_what_git_lets_it_be(text):
    git = subprocess.run(["git", "check-ref-format", f"refs/tags/{text}"], check=False).returncode == 0
    assert is_ref_name(text) == (text in REFS) == (git and text != "@")
