"""Pull from repos that stackctl did not write: what is taken for an adapter, what is fetched of it, what is refused."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import lora_config, plain_repo, safetensors_bytes, tree, version, write_checkpoint
from hub_server import HubServer

from stackctl.registry.store import Registry, init_registry
from stackctl.registry.verify import verify_registry


def test_any_peft_repo_is_an_adapter_and_only_what_belongs_to_one_is_fetched(
    run: Callable[..., Any], other_registry: Registry, tmp_path: Path, hub: HubServer
) -> None:
    hub.repo("acme/Some_LoRA", plain_repo(tmp_path))
    said = run("pull", "acme/Some_LoRA", "--registry", other_registry.root, "--json").json
    assert (said["adapter"], said["version"], said["added"]) == ("some_lora", 1, ["some_lora@1"])
    entry = version(other_registry, "some_lora@1")
    assert entry.base == "llama" and entry.versions == {"peft": "0.21.2"}
    fetched = {line.rpartition("/")[2] for line in hub.requests("/resolve/")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    assert run("pull", "acme/Some_LoRA", "--registry", other_registry.root, "--json").json["added"] == []
    config = json.dumps(lora_config(lora_alpha=8)).encode()
    hub.repos["acme/Some_LoRA"].commit({**hub.repos["acme/Some_LoRA"].files, "adapter_config.json": config}, "moved")
    assert run("pull", "acme/Some_LoRA", "--registry", other_registry.root, "--json").json["added"] == ["some_lora@2"]


def test_the_only_adapter_in_a_folder_is_found(
    run: Callable[..., Any], other_registry: Registry, tmp_path: Path, hub: HubServer
) -> None:
    hub.repo("acme/nested", {f"out/last/{name}": data for name, data in plain_repo(tmp_path).items()})
    assert run("pull", "acme/nested", "--registry", other_registry.root, "--json").json["added"] == ["nested@1"]


@pytest.fixture
def several(tmp_path: Path, hub: HubServer) -> str:
    """A repo that holds an adapter in each of two folders, and none at its root."""
    files: dict[str, bytes] = {}
    for seed, name in enumerate(("style", "runs/tone")):
        folder = write_checkpoint(tmp_path / f"several-{seed}", lora_config(), seed=seed)
        files |= {f"{name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
    hub.repo("me/several", files)
    return "me/several"


def test_of_several_adapters_none_is_guessed(run: Callable[..., Any], other_registry: Registry, several: str) -> None:
    before = tree(other_registry)
    error = run("pull", several, "--registry", other_registry.root, "--base", "llama", "--json", code=4).json["error"]
    assert error["message"] == "me/several holds several adapters: runs/tone, style"
    command = error["hint"].partition(": ")[2]
    assert tree(other_registry) == before
    words = shlex.split(command)
    assert words[:3] == ["stackctl", "pull", "me/several/runs/tone"]
    assert run(*words[1:]).json["added"] == ["tone@1"]


def test_a_folder_of_a_repo_is_pulled_pinned_and_not_twice(
    run: Callable[..., Any], other_registry: Registry, several: str, hub: HubServer
) -> None:
    head = hub.repos[several].head
    said = run("pull", "me/several/style", "--registry", other_registry.root, "--json").json
    assert (said["repo"], said["folder"], said["commit"], said["added"]) == (several, "style", head, ["style@1"])
    mine = version(other_registry, "style@1")
    assert mine.hub is not None and (mine.hub.repo, mine.hub.commit, mine.hub.folder) == (several, head, "style")
    before = tree(other_registry)
    again = run("pull", f"me/several/style@{head}", "--registry", other_registry.root, "--json").json
    assert again["added"] == [] and again["digest"] == said["digest"] and tree(other_registry) == before
    named = run("pull", "me/several/runs/tone", "--name", "mine", "--registry", other_registry.root, "--json").json
    assert named["added"] == ["mine@1"]
    assert named["digest"] != said["digest"]
    assert (
        run("pull", "me/several/runs", "--registry", other_registry.root, "--dry-run", "--json").json["folder"]
        == "runs"
    )
    page = f"https://huggingface.co/me/several/tree/{head}/style"
    assert run("pull", page, "--registry", other_registry.root, "--json").json["commit"] == head
    assert verify_registry(other_registry)[1] == []


def test_lost_weights_of_a_folder_come_back(run: Callable[..., Any], other_registry: Registry, several: str) -> None:
    run("pull", "me/several/style", "--registry", other_registry.root)
    (other_registry.weights_path(version(other_registry, "style@1")) / "adapter_model.safetensors").unlink()
    said = run("pull", "me/several/style", "--registry", other_registry.root, "--json").json
    assert said["restored"] == ["style@1"]
    (other_registry.weights_path(version(other_registry, "style@1")) / "adapter_model.safetensors").unlink()
    told = run(
        "verify", "--repair", "--registry", other_registry.root, code=None
    )  # this base has no folder, which it says too
    assert "style@1: restored from me/several@" in told.out
    assert (other_registry.weights_path(version(other_registry, "style@1")) / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("place", "code", "told"),
    [
        ("me/several/stile", 3, "me/several/style"),
        ("me/several/style@nowhere", 3, "nowhere"),
        ("me/several/style/deeper", 3, "style"),
        ("me/several/../style", 2, "names no folder"),
        ("me/several//style", 2, "names no folder"),
        ("me/several/style@", 2, "revision"),
        ("several", 2, "owner/name"),
    ],
)
def test_a_folder_that_is_not_there(
    run: Callable[..., Any], other_registry: Registry, several: str, place: str, code: int, told: str
) -> None:
    before = tree(other_registry)
    ran = run("pull", place, "--registry", other_registry.root, code=code)
    assert told in ran.err and "hint:" in ran.err
    assert tree(other_registry) == before


def test_a_line_to_paste_holds_nobody_elses_command(run: Callable[..., Any], tmp_path: Path, hub: HubServer) -> None:
    hub.repo("acme/evil", plain_repo(tmp_path, base_model_name_or_path="a/b; touch owned"))
    init_registry(registry := tmp_path / "empty")
    error = run("pull", "acme/evil", "--registry", registry, "--json", code=3).json["error"]
    typed = ["--registry", str(registry)]
    assert shlex.split(error["hint"]) == ["stackctl", "base", "add", *typed, "b--touch-owned", "a/b; touch owned"]


@pytest.mark.parametrize("path", ["adapter_config.json", "adapter_info.json", "adapter.yaml", "stack.yaml"])
def test_a_small_file_that_is_not_small_is_not_fetched(
    run: Callable[..., Any],
    other_registry: Registry,
    tmp_path: Path,
    hub: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
) -> None:
    monkeypatch.setattr("stackctl.hub.repo_contents.MAX_TEXT_BYTES", 5000)
    hub.repo("acme/huge", {**plain_repo(tmp_path), path: b" " * 6000})
    before = tree(other_registry)
    assert (
        path in run("pull", "acme/huge", "--registry", other_registry.root, "--json", code=4).json["error"]["message"]
    )
    assert not hub.requests(f"/{path}") and tree(other_registry) == before


def test_what_is_no_adapter_is_refused_before_anything_is_fetched(
    run: Callable[..., Any], other_registry: Registry, tmp_path: Path, hub: HubServer
) -> None:
    files = plain_repo(tmp_path)
    del files["adapter_model.safetensors"]
    hub.repo("acme/pickle", {**files, "adapter_model.bin": b"code"})
    hub.repo("acme/model", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.repo("acme/nothing", {})
    before = tree(other_registry)
    messages = {
        name: run("pull", f"acme/{name}", "--registry", other_registry.root, "--json", code=4).json["error"]
        for name in ("pickle", "model", "nothing")
    }
    assert "pickle" in messages["pickle"]["message"] and "stackctl base add" in messages["model"]["hint"]
    assert not hub.requests("/resolve/") and tree(other_registry) == before


def test_an_adapter_that_does_not_fit_is_refused(
    run: Callable[..., Any], other_registry: Registry, tmp_path: Path, hub: HubServer
) -> None:
    files = plain_repo(tmp_path)
    tensors = {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": (2, 8)}
    hub.repo("acme/wrong", {**files, "adapter_model.safetensors": safetensors_bytes(tensors)})
    before = tree(other_registry)
    run("pull", "acme/wrong", "--registry", other_registry.root, code=4)
    assert tree(other_registry) == before


def test_another_kind_that_can_be_made_a_lora_is_refused_with_the_way(
    run: Callable[..., Any], other_registry: Registry, tmp_path: Path, hub: HubServer
) -> None:
    hub.repo("acme/dora", plain_repo(tmp_path, use_dora=True))
    error = run("pull", "acme/dora", "--registry", other_registry.root, "--json", code=4).json["error"]
    assert "hf download acme/dora --local-dir FOLDER" in error["hint"]
    assert f"stackctl add --registry {other_registry.root} dora FOLDER --convert" in error["hint"]
