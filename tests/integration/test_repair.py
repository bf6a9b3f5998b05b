"""``pull`` and ``verify --repair`` bring back the files of what is registered, from a Hub on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import flip, hub_base, make_registry, register
from hub_server import HubServer

from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def pushed(run: Callable[..., Any], hub: HubServer, tmp_path: Path) -> Registry:
    """style@1, instruct@1 on it, tone@1 of nobody, and the stack ``teller`` with its members on the Hub."""
    registry = make_registry(tmp_path / "registry", hub_base())
    register(registry, "style", seed=1)
    register(registry, "instruct", ["style@1"], seed=2)
    register(registry, "tone", seed=3)
    (registry.root / "weights/style/1/tokenizer.json").write_text("{}")
    run("compose", "style+instruct", "--name", "teller")
    run("push", "teller", "me/teller", "--members")
    run("push", "style", "me/style")
    hub.trace.clear()
    return registry


@pytest.fixture
def clone(pushed: Registry, tmp_path: Path) -> Registry:
    """The same project as git has it, elsewhere: its entries, and no weights."""
    root = tmp_path / "clone" / "registry"
    shutil.copytree(pushed.root, root, ignore=shutil.ignore_patterns("weights", ".lock", ".digests.json"))
    return Registry(root)


def entries(registry: Registry) -> dict[str, bytes]:
    return {str(p.relative_to(registry.root)): p.read_bytes() for p in registry.root.rglob("*.yaml")}


def checkpoint(registry: Registry, label: str) -> Path:
    return registry.root / "weights" / label.replace("@", "/")


def damaged(registry: Registry) -> set[str]:
    return {problem["what"] for problem in verify_registry(registry)[1]}


# -- pull ----------------------------------------------------------------------------------------------------------


def test_a_clone_gets_its_weights_back_as_the_same_versions(
    run: Callable[..., Any], pushed: Registry, clone: Registry, hub: HubServer
) -> None:
    before = entries(clone)
    said = run("pull", "me/teller", "--registry", clone.root, "--json").json
    assert (said["stack"], said["added"], said["restored"]) == ("teller", [], ["style@1", "instruct@1"])
    assert entries(clone) == before
    assert damaged(clone) == {"tone@1"}
    assert (checkpoint(clone, "style@1") / "tokenizer.json").read_text() == "{}"
    hub.trace.clear()
    again = run("pull", "me/teller", "--registry", clone.root, "--json").json
    assert (again["added"], again["restored"]) == ([], [])
    assert not hub.requests("adapter_model.safetensors")


def test_only_the_member_that_is_damaged_is_fetched(run: Callable[..., Any], pushed: Registry, hub: HubServer) -> None:
    flip(checkpoint(pushed, "instruct@1") / WEIGHTS)
    config = (checkpoint(pushed, "instruct@1") / CONFIG).read_bytes()
    assert run("pull", "me/teller", "--dry-run", "--json").json["restored"] == ["instruct@1"]
    assert damaged(pushed) == {"instruct@1"}
    ran = run("pull", "me/teller")
    assert "the files of instruct@1" in ran.out and "style" not in ran.out
    assert damaged(pushed) == set()
    assert (checkpoint(pushed, "instruct@1") / CONFIG).read_bytes() == config, "what was right there was replaced"
    assert {line.split("/")[-2] for line in hub.requests("/" + WEIGHTS)} == {"instruct"}


def test_one_adapter_gets_its_files_back_whatever_it_is_called_here(
    run: Callable[..., Any], clone: Registry, hub: HubServer
) -> None:
    said = run("pull", "me/style", "--registry", clone.root, "--json").json
    assert (said["adapter"], said["version"], said["added"], said["restored"]) == ("style", 1, [], ["style@1"])
    assert damaged(clone) == {"instruct@1", "tone@1"}


def test_a_repo_without_the_members_says_what_is_still_missing(
    run: Callable[..., Any], pushed: Registry, clone: Registry, hub: HubServer
) -> None:
    run("push", "teller", "me/sum")
    ran = run("pull", "me/sum", "--registry", clone.root)
    assert "style@1, instruct@1" in ran.err and "verify --repair" in ran.err


@pytest.mark.parametrize("fault", ["corrupted", "cut", "changed there"])
def test_nothing_that_is_not_the_version_is_put_in_its_place(
    run: Callable[..., Any], clone: Registry, hub: HubServer, fault: str
) -> None:
    if fault == "corrupted":
        hub.corrupt.add(f"members/style/{WEIGHTS}")
    elif fault == "cut":
        hub.fail("members/instruct/" + WEIGHTS, cut=True)
    else:
        repo = hub.repos["me/teller"]
        path = f"members/style/{WEIGHTS}"
        repo.commit({**repo.files, path: repo.files[path][:-1] + b"\1"})
    ran = run("pull", "me/teller", "--registry", clone.root, "--json", code=6 if fault == "cut" else 5)
    assert ran.json["error"]["message"]
    assert "style@1" in damaged(clone) or fault == "cut"
    assert "instruct@1" in damaged(clone)
    assert not list(clone.root.rglob(".tmp-*"))


# -- verify --repair -----------------------------------------------------------------------------------------------


def test_verify_says_what_can_be_had_from_where_and_asks_nobody(
    run: Callable[..., Any], clone: Registry, hub: HubServer
) -> None:
    commits = {name: repo.head for name, repo in hub.repos.items()}
    found = run("verify", "--registry", clone.root, "--json", code=5).json
    assert found["restored"] == []
    assert {p["what"]: p["restore"] for p in found["problems"]} == {
        "style@1": {"from": "hub", "place": f"me/style@{commits['me/style']}"},
        "instruct@1": {"from": "hub", "place": f"me/teller@{commits['me/teller']}"},
        "tone@1": None,
    }
    text = run("verify", "--registry", clone.root, code=5).out
    assert "me/style@" in text and "stackctl verify --repair" in text
    assert hub.trace == []


def test_repair_fetches_what_the_entries_record_and_lists_what_is_left(
    run: Callable[..., Any], clone: Registry, hub: HubServer
) -> None:
    before = entries(clone)
    found = run("verify", "--repair", "--registry", clone.root, "--json", code=5).json
    assert [(r["what"], r["from"]) for r in found["restored"]] == [("instruct@1", "hub"), ("style@1", "hub")]
    assert [p["what"] for p in found["problems"]] == ["tone@1"]
    assert entries(clone) == before
    assert damaged(clone) == {"tone@1"}
    run("verify", "--repair", "teller", "--registry", clone.root)


def test_repair_goes_on_to_the_hub_only_for_what_is_nowhere_else(
    run: Callable[..., Any], pushed: Registry, clone: Registry, hub: HubServer
) -> None:
    found = run("verify", "--repair", "--from", pushed.root, "--registry", clone.root, "--json").json
    assert [r["from"] for r in found["restored"]] == ["folder"] * 3
    assert found["problems"] == [] and damaged(clone) == set() and hub.trace == []
    flip(checkpoint(clone, "style@1") / WEIGHTS)
    flip(checkpoint(clone, "instruct@1") / CONFIG)
    shutil.copytree(checkpoint(pushed, "style@1"), checkpoint(clone, "style@9"))
    before = (checkpoint(clone, "instruct@1") / WEIGHTS).stat()
    found = run("verify", "--repair", "--registry", clone.root, "--json").json
    assert [(r["what"], r["from"]) for r in found["restored"]] == [("instruct@1", "hub"), ("style@1", "registry")]
    assert not hub.requests(WEIGHTS), "the weights were right, and only the configuration was not"
    assert (checkpoint(clone, "instruct@1") / WEIGHTS).stat() == before
    assert run("verify", "--registry", clone.root, "--repair", "--json").json["restored"] == []


def test_offline_it_says_why_and_what_would_help(
    run: Callable[..., Any], clone: Registry, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = run("verify", "--repair", "instruct", "--registry", clone.root, "--json", code=5)
    (problem,) = ran.json["problems"]
    assert "offline" in problem["message"] and "me/teller" in problem["message"]
    assert "Traceback" not in ran.err and not checkpoint(clone, "instruct@1").exists()


def test_what_the_hub_has_changed_behind_its_commit_is_refused_and_the_rest_comes(
    run: Callable[..., Any], clone: Registry, hub: HubServer
) -> None:
    hub.corrupt.add(f"members/instruct/{WEIGHTS}")
    found = run("verify", "--repair", "teller", "--registry", clone.root, "--json", code=5).json
    assert [r["what"] for r in found["restored"]] == ["style@1"]
    assert [p["what"] for p in found["problems"]] == ["instruct@1"]
    hub.heal()
    run("verify", "--repair", "teller", "--registry", clone.root)


def test_a_place_that_is_gone_or_nonsense_is_a_plain_sentence(
    run: Callable[..., Any], clone: Registry, hub: HubServer
) -> None:
    entry = clone.root / "adapters" / "style.yaml"
    entry.write_text(entry.read_text().replace("me/style", "../../etc"))
    del hub.repos["me/teller"]
    found = run("verify", "--repair", "teller", "--registry", clone.root, "--json", code=5).json
    assert {p["what"] for p in found["problems"]} == {"style@1", "instruct@1"}
    assert all("restored" in p["message"] for p in found["problems"])


def test_from_is_for_repair_and_a_folder_that_is_there(run: Callable[..., Any], pushed: Registry) -> None:
    run("verify", "--from", pushed.root, code=2)
    run("verify", "--repair", "--from", "nowhere", code=3)
