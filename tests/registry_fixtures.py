"""What the black-box tests share: a registry that costs no torch, and the shape that every failure has."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_base, make_registry, register

from stackctl.registry.store import Registry
from stackctl.render.terminal import printable

CODES = {1: "failed", 2: "usage", 3: "not_found", 4: "incompatible", 5: "verification_failed", 6: "hub"}


@pytest.fixture(scope="session")
def four_adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``filled_registry`` is a copy of."""
    root = tmp_path_factory.mktemp("filled") / "registry"
    registry = make_registry(root, make_base("tiny"), make_base("other", "sha256:" + "0" * 64))
    register(registry, "style", seed=1)
    register(registry, "instruct", ["style@1"], seed=2)
    register(registry, "tone", seed=3)
    register(registry, "foreign", base="other", seed=4)
    return root


@pytest.fixture
def filled_registry(run: Callable[..., Any], tmp_path: Path, four_adapters: Path) -> Registry:
    """style, instruct (trained on style) and tone on the base ``tiny``, foreign on ``other``; no model anywhere."""
    return Registry(Path(shutil.copytree(four_adapters, tmp_path / "registry")).resolve())


@pytest.fixture
def fails(run: Callable[..., Any]) -> Callable[..., str]:
    """Run a command that must fail, plainly and with --json; returns its message and hint on one line."""

    def check(*arguments: object, code: int) -> str:
        plain = run(*arguments, code=code)
        assert plain.out == ""
        assert "Traceback" not in plain.err
        lines = plain.err.splitlines()
        assert sum(line.startswith(("error:", "hint:")) for line in lines) == 2
        assert lines[-2].startswith("error: ")
        assert lines[-1].startswith("hint: ")
        split = arguments.index("--") if "--" in arguments else len(arguments)
        spoken = run(*arguments[:split], "--json", *arguments[split:], code=code)
        assert spoken.err.splitlines()[-2:] == lines[-2:]
        document = json.loads(spoken.out)
        assert document["schema"] == 1
        assert list(document) == ["schema", "error"]
        assert list(document["error"]) == ["code", "message", "hint"]
        assert document["error"]["code"] == CODES[code]
        assert printable(" ".join(document["error"]["message"].split())) == lines[-2].removeprefix("error: ")
        assert " ".join(document["error"]["hint"].split()) == lines[-1].removeprefix("hint: ")
        return lines[-2].removeprefix("error: ") + " | " + lines[-1].removeprefix("hint: ")

    return check


@pytest.fixture
def project(registry: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder with a registry, data, and the ``RECIPE`` of the test's file."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "style.jsonl").write_text('{"text": "The tide."}\n{"text": "A lamp."}\n')
    chat = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
    (tmp_path / "data" / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (tmp_path / "stackctl.yaml").write_text(request.module.RECIPE)
    return tmp_path


def why(run: Callable[..., Any], *flags: str) -> dict[str, str]:
    """What a dry run of a recipe says is out of date, and why, in its order."""
    plan = run("train", "--dry-run", "--json", *flags).json["plan"]
    return {step["name"]: step["why"] for step in plan if step["why"]}
