"""Repositories of a Hub whose files are named to lead out, or hold what harms: a sample of ``make stress``."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_base, make_registry, write_checkpoint
from hostile import tree
from hub_server import HubServer
from stress.fuzz_hub import OUT, make_repos, try_repo


@pytest.mark.parametrize("seed", [0])
def test_whatever_a_repo_holds(tmp_path: Path, hub: HubServer, seed: int) -> None:
    whole, chance = make_repos(tmp_path, hub), random.Random(seed)
    assert [wrong for _ in range(8) for wrong in try_repo(whole, hub, tmp_path, chance)[1]] == []


@pytest.mark.parametrize(
    "name", [name for name in OUT if name.endswith("adapter_config.json")], ids=lambda name: repr(name[:20])
)
def test_a_file_that_is_named_to_lead_out_stays_in(run: Any, tmp_path: Path, hub: HubServer, name: str) -> None:
    """It is taken for the configuration of an adapter, in a folder that is none of the repo's."""
    registry = make_registry(tmp_path / "a" / "b" / "registry", make_base())
    folder = write_checkpoint(tmp_path / "evil")
    config, weights = (folder / "adapter_config.json", folder / "adapter_model.safetensors")
    prefix = name.removesuffix("adapter_config.json")
    hub.repo("acme/evil", {name: config.read_bytes(), f"{prefix}adapter_model.safetensors": weights.read_bytes()})
    before = {key: data for key, data in tree(tmp_path).items() if not key.startswith("hf")}
    ran = run("pull", "acme/evil", "--registry", registry.root, code=None)
    after = {key: data for key, data in tree(tmp_path).items() if not key.startswith("hf")}
    if ran.code:
        assert ran.code in (3, 4, 6), ran.err
        assert after == before
    else:
        new = [key for key in after if key not in before]
        assert new and all(key.startswith("a/b/registry/") for key in new)


def test_a_configuration_at_a_root_of_its_own_is_none_of_the_repos(run: Any, tmp_path: Path, hub: HubServer) -> None:
    registry = make_registry(tmp_path / "registry", make_base())
    folder = write_checkpoint(tmp_path / "odd")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    hub.repo("acme/odd", {"/adapter_config.json": b"{}", "adapter_model.safetensors": weights})
    ran = run("pull", "acme/odd", "--registry", registry.root, code=4)
    assert "holds no PEFT adapter" in ran.err
