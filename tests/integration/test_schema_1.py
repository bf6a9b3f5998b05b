"""A registry of schema 1, as it was written when that was the newest, is read, verified and used by today's code.

It was made by stackctl itself: a base, two adapters of which one was trained on the other, three stacks, and something
that was removed. Never write into ``tests/frozen``: every test works on a copy. It has no ``.gitignore``, which would
keep its weights out of git.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackctl.core import migrations
from stackctl.core.errors import Usage
from stackctl.core.fields import SCHEMA
from stackctl.core.schema import Adapter, Removed, Stack
from stackctl.registry import store
from stackctl.registry.store import Registry

FROZEN = Path(__file__).parent.parent / "frozen"
Run = Callable[..., Any]


@pytest.fixture
def frozen(run: Run, tmp_path: Path) -> Registry:
    shutil.copytree(FROZEN / "schema-1", tmp_path, dirs_exist_ok=True)
    return Registry(tmp_path / "registry")


def entry_texts(registry: Registry) -> dict[str, str]:
    return {str(path.relative_to(registry.root)): path.read_text() for path in registry.root.glob("**/*.yaml")}


def test_every_schema_has_a_frozen_registry_and_every_step_is_there() -> None:
    assert sorted(path.name for path in FROZEN.iterdir()) == [f"schema-{n}" for n in range(1, SCHEMA + 1)]
    assert len(migrations.STEPS) == SCHEMA - 1


def test_it_is_read_and_verified(frozen: Registry, run: Run) -> None:
    before = entry_texts(frozen)
    listed = run("ls", "--json").json
    assert {a["name"]: [v["version"] for v in a["versions"]] for a in listed["adapters"]} == {
        "instruct": [1],
        "style": [1, 2],
    }
    weights = {s["name"]: [m["weight"] for m in s["members"]] for s in listed["stacks"]}
    assert weights == {"both": [1, 1], "soft": [0.5], "trimmed": [1, 1]}
    assert listed["current"] == "soft"
    told = run("inspect", "instruct", "--json").json
    assert told["needs"] == ["style@1:0.5"]
    assert (told["run"]["steps"], told["settings"]["rank"], told["data"]["records"]) == (4, 2, 3)
    removed = frozen.find_removed("old")
    assert [given.version for given in removed.given] == [1]
    assert run("inspect", removed.versions[0].digest, "--json").json["rank"] == 2
    assert run("verify", "--json").json["problems"] == []
    assert entry_texts(frozen) == before, "reading writes nothing"


def test_it_is_used(frozen: Registry, run: Run, tmp_path: Path) -> None:
    """The exported sum is the one that its own files make."""
    run("export", "both", "--format", "peft", "--out", "out")
    summed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    files = [frozen.root / "weights" / name / "1" / "adapter_model.safetensors" for name in ("style", "instruct")]
    parts = [load_file(path) for path in files]
    config = run("inspect", "./out", "--json").json["lora"]
    for module in ("self_attn.q_proj", "mlp.down_proj"):
        a, b = (f"base_model.model.model.layers.0.{module}.lora_{factor}.weight" for factor in "AB")
        expected = sum(2.0 * part[b].double() @ part[a].double() for part in parts)  # alpha 4 over rank 2
        found = config["lora_alpha"] / config["r"] * summed[b].double() @ summed[a].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)
    run("compose", "style+instruct", "--name", "now")
    assert run("add", "style", "registry/weights/style/1", "--base", "tiny", "-q").out == "style@1\n"
    assert run("add", "old", "registry/weights/old/1", "--base", "tiny", "-q").out == "old@2\n", (
        "a number is given once"
    )
    for what in ("both", "trimmed"):
        assert run("generate", what, "-p", "Hi.", "--max-new-tokens", 3, "--json").json["new_tokens"] > 0
    run("rm", "soft")
    assert run("verify", "--json").json["problems"] == []


def to_2(kind: type, value: dict[str, Any]) -> dict[str, Any]:
    """Schema 2 as it might come: a description always ends with a full stop."""
    if kind is not Adapter or not isinstance(value.get("description"), str):
        return value
    return value | {"description": value["description"].removesuffix(".") + "."}


def test_a_later_schema_reads_it_and_writes_its_own_with_the_next_change(
    frozen: Registry, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = entry_texts(frozen)
    monkeypatch.setattr(store, "SCHEMA", 2)
    monkeypatch.setattr(migrations, "STEPS", (to_2,))
    style = frozen.find_adapter("style")
    assert style and style.description == "the voice."
    assert run("verify", "--json").json["problems"] == []
    assert run("generate", "both", "-p", "Hi.", "--max-new-tokens", 3, "--json").json["new_tokens"] > 0
    assert entry_texts(frozen) == before, "reading converts nothing on disk"
    run("rm", "soft")
    run("rm", "trimmed")
    run("rm", "style@2")
    after = entry_texts(frozen)
    assert after["adapters/style.yaml"].startswith("schema: 2\nname: style\ndescription: the voice.\n")
    changed = {name for name, text in after.items() if text != before.get(name)}
    assert changed == {"adapters/style.yaml", "removed/style.yaml", "registry.yaml"}
    assert all(after[name].startswith("schema: 2\n") for name in changed)
    assert run("verify", "--json").json["problems"] == []


@pytest.mark.parametrize("name", ["adapters/style.yaml", "registry.yaml"])
def test_what_a_later_stackctl_wrote_is_refused(frozen: Registry, run: Run, name: str) -> None:
    path = frozen.root / name
    text = path.read_text()
    path.write_text(text.replace("schema: 1", "schema: 2", 1))
    before = entry_texts(frozen)
    for command in (["inspect", "style@1"], ["rm", "style@2"], ["add", "style", "registry/weights/old/1"]):
        if name == "adapters/style.yaml" or command[0] != "inspect":
            ran = run(*command, code=2)
            assert f"{path}, line 1, column 9: schema 2 is newer than stackctl" in ran.err
            assert "pip install --upgrade" in ran.err
    assert "schema 2 is newer" in run("verify", code=5).out
    assert entry_texts(frozen) == before
    path.write_text(text)
    assert run("verify", "--json").json["problems"] == []


def test_a_schema_without_a_step_is_not_guessed(frozen: Registry, run: Run) -> None:
    path = frozen.root / "adapters" / "style.yaml"
    for wrong in ("0", "-1", "one", "true", "1.0", "[1]", "null", "'1'"):
        path.write_text(path.read_text().replace(path.read_text().splitlines()[0], f"schema: {wrong}", 1))
        with pytest.raises(Usage, match="schema"):
            frozen.find_adapter("style")


def test_several_steps_in_order_and_what_no_step_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        migrations, "STEPS", tuple(lambda kind, v, n=n: v | {"seen": [*v.get("seen", []), n]} for n in (1, 2, 3))
    )
    assert migrations.migrate({"schema": 1}, Stack, 4) == {"schema": 4, "seen": [1, 2, 3]}
    assert migrations.migrate({"schema": 3}, Removed, 4) == {"schema": 4, "seen": [3]}
    for schema in (4, 5, 0, -1, True, "1", None, 1.0, []):
        assert migrations.migrate({"schema": schema}, Stack, 4) == {"schema": schema}
