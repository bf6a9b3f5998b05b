"""One byte that is not what was registered: every command that loads the file ends with 5 and says whose it is.

The size stays, and the time of the change may be set back: what tells is the time of the inode's change.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import random_adapter

from stackctl.storage.hashes import DigestCache

TRAIN = ("--data", "x.jsonl", "--max-steps", "1", "--rank", "2")
LOADING_ADAPTERS = (
    ("compose", "style+instruct", "--name", "again"),
    ("compose", "style+instruct", "--method", "ties", "--name", "tied"),
    ("inspect", "both", "--weights"),
    ("inspect", "both", "--interference"),
    ("inspect", "instruct", "--verify"),
    ("push", "both", "me/both", "--base-id", "acme/tiny", "--dry-run"),
    ("push", "instruct", "me/instruct", "--base-id", "acme/tiny"),
    ("export", "both", "--out", "out"),
)
LOADING_BOTH = (
    ("generate", "both", "-p", "x"),
    ("generate", "instruct", "-p", "x", "--live"),
    ("compare", "base", "both", "-p", "x"),
    ("eval", "base", "both", "--data", "x.jsonl"),
    ("export", "both", "--out", "out", "--format", "model"),
    ("export", "both", "--out", "out", "--format", "gguf"),
    ("train", "more", "--on", "both", *TRAIN),
    ("train", "more", "--on", "both", "--frozen", "live", *TRAIN),
    ("train",),
)
RECIPE = "base: tiny\ntrain:\n  more: {on: both, data: x.jsonl, max_steps: 1, rank: 2}\n"


@pytest.fixture(scope="module")
def adapter(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(models("llama"), tmp_path_factory.mktemp("made") / "adapter")


@pytest.fixture
def project(run: Any, models: Any, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """style@1, instruct@1 and their stack ``both`` on a base in ``model``, all of whose digests are remembered."""
    monkeypatch.setattr("stackctl.storage.hashes._SETTLED_SECONDS", 0.0)
    shutil.copytree(models("llama"), tmp_path / "model")
    run("init")
    run("base", "add", "tiny", "model")
    run("add", "style", adapter)
    run("add", "instruct", adapter, "--on", "style")
    run("compose", "style+instruct", "--name", "both")
    (tmp_path / "x.jsonl").write_text('{"text": "the sea"}\n')
    (tmp_path / "stackctl.yaml").write_text(RECIPE)
    time.sleep(0.02)  # more than a tick of the clock that stamps inodes
    return tmp_path


INSTRUCT = "registry/weights/instruct/1/"
TAMPERED: dict[str, tuple[str, bytes | int, bytes]] = {
    "a weight of an adapter": (INSTRUCT + "adapter_model.safetensors", -3, b""),
    "a name in its header": (INSTRUCT + "adapter_model.safetensors", b"lora_A", b"lora_Z"),
    "the length of its header": (INSTRUCT + "adapter_model.safetensors", 7, b""),
    "its alpha": (INSTRUCT + "adapter_config.json", b'"lora_alpha": ', b'"lora_alphx": '),
    "its rank": (INSTRUCT + "adapter_config.json", b'"r": 4', b'"r": 5'),
    "a brace of its configuration": (INSTRUCT + "adapter_config.json", b"{", b"["),
    "a weight of the base": ("model/model.safetensors", -3, b""),
    "the base's configuration": ("model/config.json", b'"rms_norm_eps": 1', b'"rms_norm_eps": 2'),
    "a brace of it": ("model/config.json", b"{", b"["),
    "the base's tokenizer": ("model/tokenizer.json", b'"BPE"', b'"BPX"'),
    "its settings": ("model/tokenizer_config.json", b"eos_token", b"eos_tokem"),
    "the base's chat template": ("model/chat_template.jinja", b"content", b"c0ntent"),
}
"""What is changed: the file, and the byte of it that is flipped or the text that becomes another of that length."""


def tamper(path: Path, where: bytes | int, new: bytes) -> None:
    raw = bytearray(path.read_bytes())
    if isinstance(where, int):
        raw[where] ^= 1
    else:
        start = raw.index(where)
        assert len(new) == len(where) and new != where
        raw[start : start + len(new)] = new
    path.write_bytes(raw)


@pytest.mark.parametrize("set_back", [False, True], ids=["", "with its time set back"])
@pytest.mark.parametrize("what", TAMPERED)
def test_a_changed_file_is_5_and_named(project: Path, run: Any, what: str, set_back: bool) -> None:
    path = project / TAMPERED[what][0]
    cache = DigestCache(project / "registry")
    before = path.stat()
    remembered = cache.sha256(path)
    run("inspect", "both", "--weights")
    registry = {p: p.read_bytes() for p in (project / "registry").rglob("*.yaml")}
    tamper(path, *TAMPERED[what][1:])
    if set_back:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    assert DigestCache(project / "registry").sha256(path) != remembered
    is_base = path.is_relative_to(project / "model")
    for command in LOADING_BOTH if is_base else LOADING_ADAPTERS + LOADING_BOTH:
        said = run(*command, "--json", code=5).json["error"]["message"]
        assert ("tiny" if is_base else "instruct@1") in said, command
        assert "style@1" not in said, command
        assert not (project / "out").exists()
    assert {p: p.read_bytes() for p in (project / "registry").rglob("*.yaml")} == registry
    found = run("verify", "--json", code=5).json["problems"]
    assert [problem["what"] for problem in found] == ["tiny" if is_base else "instruct@1"]


def test_a_tokenizer_that_was_changed_on_purpose_is_registered_again(project: Path, run: Any) -> None:
    path = project / "model" / "tokenizer_config.json"
    assert run("base", "add", "tiny", "model").err == ""
    path.write_text(path.read_text() + "\n")
    (problem,) = run("verify", "--json", code=5).json["problems"]
    assert "other files of its tokenizer" in problem["message"]
    hint = run("generate", "style", "-p", "x", code=5).err.splitlines()[-1]
    assert hint.endswith(f"stackctl base add tiny {project / 'model'}")
    assert "another one than the one that was registered" in run("base", "add", "tiny", project / "model").err
    assert run("verify", "--json").json["problems"] == []
    assert run("base", "add", "tiny", "model").err == ""


def test_a_base_that_was_registered_before_tokenizers_were_recorded_stays_good(project: Path, run: Any) -> None:
    entry = project / "registry" / "bases" / "tiny.yaml"
    lines = entry.read_text().splitlines(keepends=True)
    entry.write_text("".join(line for line in lines if not line.startswith("tokenizer: sha256:")))
    assert len(entry.read_text().splitlines()) == len(lines) - 1
    (project / "model" / "tokenizer_config.json").write_text("{}")
    assert run("verify", "--json").json["problems"] == []
    assert run("base", "add", "tiny", "model").err == ""
    assert entry.read_text().count("tokenizer: sha256:") == 1


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_file_that_is_gone_is_3_and_named(project: Path, run: Any, name: str) -> None:
    (project / INSTRUCT / name).unlink()
    for command in LOADING_ADAPTERS + LOADING_BOTH:
        assert "instruct@1" in run(*command, "--json", code=3).json["error"]["message"], command


def test_what_is_remembered_is_not_read_again(project: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run("inspect", "both", "--weights")
    hashed: list[Path] = []
    monkeypatch.setattr("stackctl.storage.hashes.sha256_file", hashed.append)
    run("inspect", "both", "--weights")
    assert hashed == []
