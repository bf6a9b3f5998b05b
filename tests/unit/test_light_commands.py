"""Commands that look and do not compute start no tensor library.

Each runs in a process of its own, which is forked off one that has ``stackctl.cli`` alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import msgspec
import pytest
from checkpoints import make_registry, register, write_checkpoint

from stackctl.core.provenance import DataSource
from stackctl.core.train_job import TrainSettings
from stackctl.registry.store import Registry
from stackctl.storage.hashes import sha256_file

HEAVY = {
    "accelerate", "datasets", "gguf", "huggingface_hub", "numpy", "pandas", "peft", "prompt_toolkit", "safetensors",
    "tokenizers",
    "torch", "transformers",
}  # fmt: skip
PROGRAM = """
import json, os, sys
from stackctl.cli import main
for line in sys.stdin:
    arguments, folder, environment = json.loads(line)
    if not os.fork():
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        os.dup2(os.open("out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdin, sys.argv = open(0), ["stackctl", *arguments]
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            print(*sys.modules, file=open("modules", "w"), flush=True)
            sys.stdout.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    """A process that forks off one for each command."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def filled_registry(tmp_path) -> Registry:
    registry = make_registry(tmp_path / "registry")
    register(registry, "style", seed=1)
    register(registry, "instruct", ["style@1"], seed=2)
    return registry


@pytest.fixture
def light(server, tmp_path):
    """Run a command in ``tmp_path``; nothing heavy may be loaded when it ends."""

    def run(*arguments, code=0):
        print(json.dumps([arguments, str(tmp_path), dict(os.environ)]), file=server.stdin, flush=True)
        ended = int(server.stdout.readline())
        assert ended == code, (tmp_path / "err").read_text()
        loaded = (tmp_path / "modules").read_text().split()
        assert not {name.partition(".")[0] for name in loaded} & HEAVY
        assert "stackctl.cli" in loaded
        return (tmp_path / "out").read_text()

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        (), ("--help",), ("--version",), ("base",), ("train", "--help"), ("generate", "--help"), ("ls",),
        ("ls", "--json"), ("base", "ls"), ("compose", "style+instruct", "--dry-run"),
        ("compose", "style+instruct", "--json"),
        ("inspect", "instruct"), ("inspect", "style:0.5+instruct", "--json"), ("inspect", "tiny"),
        ("inspect", "./checkpoint"),
        ("inspect", "style", "--verify"), ("rm", "instruct@1"), ("add", "more", "checkpoint"), ("verify", "--help"),
        ("init", "elsewhere"), ("push", "--help"), ("pull", "--help"), ("export", "--help"), ("demo", "--help"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_light_commands_load_nothing_heavy(filled_registry, light, tmp_path, arguments):
    write_checkpoint(tmp_path / "checkpoint")
    light(*arguments)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("nosuch",), 2), (("train", "x", "--rank", "no"), 2), (("generate", "nosuch", "-p", "x"), 3), (("train",), 2),
        (("eval", "style", "--data", "nosuch.jsonl", "--device", "abacus"), 2), (("train", "x", "--on", "nosuch"), 3),
        (("inspect", "style@9"), 3), (("export", "nosuch"), 3), (("verify",), 5), (("base", "add", "base"), 2),
        (("compare", "style", "nosuch", "-p", "x"), 3), (("train", "x", "--data", "nosuch.jsonl"), 3),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_said_before_anything_heavy_is_loaded(filled_registry, light, tmp_path, arguments, code):
    light(*arguments, code=code)


def test_an_up_to_date_recipe_loads_nothing_heavy(filled_registry, light, tmp_path):
    data = tmp_path / "style.jsonl"
    data.write_text('{"text": "x"}\n')
    adapter = filled_registry.find_adapter("style")
    trained = msgspec.structs.replace(
        adapter.newest(),
        settings=msgspec.to_builtins(TrainSettings(rank=2)),
        data=DataSource(path="style.jsonl", sha256=sha256_file(data), records=1, format="text"),
    )
    filled_registry.write(msgspec.structs.replace(adapter, versions=[trained]))
    recipe = "base: tiny\ntrain: {style: {data: style.jsonl, rank: 2}}\nstacks: {solo: style}\n"
    (tmp_path / "stackctl.yaml").write_text(recipe)
    assert [step["why"] for step in json.loads(light("train", "--json", "--dry-run"))["plan"]] == [
        None,
        "not composed yet",
    ]
    light("train")  # composing needs no tensors either
    before = {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in filled_registry.root.rglob("*")
    }
    assert light("train") == "up to date\n"
    after = {
        path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in filled_registry.root.rglob("*")
    }
    assert after == before


@pytest.mark.parametrize("words", ["inspect st", "train x --on st", "compose instruct+st", "eval base st"])
def test_completion_offers_names_and_loads_nothing_heavy(filled_registry, light, tmp_path, words, monkeypatch):
    monkeypatch.setenv("_STACKCTL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"stackctl {words}")
    monkeypatch.setenv("COMP_CWORD", str(len(words.split())))
    offered = light()
    assert "style" in offered


@pytest.mark.parametrize(
    ("shell", "line", "offered", "alone"),
    [
        ("bash", "stackctl\npu", "pull push", False),
        ("bash", "stackctl\npush\n", "instruct style tiny", True),
        ("zsh", "stackctl pu", "pull push", False),
        ("zsh", "stackctl push ", "instruct style tiny", True),
        ("fish", "stackctl rm s", "style", True), ("fish", "stackctl base rm ", "tiny", True),
        ("zsh", "stackctl", "pull push", False),
    ],
    ids=repr,
)  # fmt: skip
def test_completion_builds_only_the_command_that_is_typed(
    filled_registry, light, tmp_path, monkeypatch, shell, line, offered, alone
):
    """... and all of them as long as its name is not there."""
    monkeypatch.setenv("_STACKCTL_COMPLETE", f"complete_{shell}")
    if shell == "bash":
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(line.count("\n")))
    else:
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
    words = set(re.findall("[a-z-]+", light()))
    assert " ".join(sorted(words & {"push", "pull", "style", "instruct", "tiny"})) == offered
    assert ("stackctl.cli.train" not in (tmp_path / "modules").read_text().split()) == alone
