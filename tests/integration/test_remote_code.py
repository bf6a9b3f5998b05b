"""No code of a model's repository runs: not when it is asked for by its files, and there is no way to ask for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def evil(models: Any, tmp_path: Path) -> Path:
    """A model whose files ask for code that leaves a mark as soon as it is imported."""
    folder = shutil.copytree(models("llama"), tmp_path / "evil")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass EvilConfig: pass\n")
    change(folder / "config.json", auto_map=AUTO_MAP)
    change(folder / "tokenizer_config.json", auto_map=AUTO_MAP)
    return folder


def test_code_that_a_known_model_brings_is_passed_over(
    run: Callable[..., Any], evil: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The architecture is one of transformers' own, which is what loads it; nothing is asked, whoever would say yes."""
    (tmp_path / "data.jsonl").write_text('{"text": "The sea."}\n')
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("something was asked"))
    run("init")
    run("base", "add", "evil", evil, stdin="y\n" * 9)
    run("train", "style", "--data", "data.jsonl", "--max-steps", 1, "--dry-run", stdin="y\n" * 9)
    run("train", "style", "--data", "data.jsonl", "--max-steps", 1, stdin="y\n" * 9)
    run("generate", "style", "-p", "Hi.", "--max-new-tokens", 2, stdin="y\n" * 9)
    run("export", "style", "--format", "model", "--out", "whole")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_a_model_that_needs_code_of_its_own_is_refused(
    run: Callable[..., Any], evil: Path, tmp_path: Path, where: str
) -> None:
    key = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}[where]
    change(evil / where, **{key: "Evil"})
    run("init")
    run("base", "add", "evil", evil, code=4, stdin="y\n" * 9)
    assert not (tmp_path / "mark").exists()
    assert run("ls", "--json").json["bases"] == []


def test_there_is_no_way_to_ask_for_it(run: Callable[..., Any], evil: Path, tmp_path: Path) -> None:
    run("init")
    run("base", "add", "evil", evil, "--trust-remote-code", code=2)
    for name, text in (
        ("stackctl.yaml", "trust_remote_code: true\n"),
        ("stackctl.yaml", "train:\n  style: {data: x.jsonl, trust_remote_code: true}\n"),
        ("job.yaml", "data: x.jsonl\ntrust_remote_code: true\n"),
    ):
        (tmp_path / name).write_text(text)
        ran = run("train", "style", "--config", name, code=2) if name == "job.yaml" else run("train", code=2)
        assert "unknown key 'trust_remote_code'" in ran.err
    entry = tmp_path / "registry" / "bases" / "evil.yaml"
    run("base", "add", "evil", evil)
    entry.write_text(entry.read_text() + "trust_remote_code: true\n")
    assert "unknown key 'trust_remote_code'" in run("inspect", "evil", code=2).err
    assert not (tmp_path / "mark").exists()
