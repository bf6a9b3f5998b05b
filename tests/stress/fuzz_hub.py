"""Hostile repos, pulled from a Hub on this machine: names that lead out, entries that lie, weights that are none."""

from __future__ import annotations

import functools
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from checkpoints import make_base, make_registry
from hostile import contain, ill_mannered, mutate, mutate_file, tree
from hub_server import HubServer, connect, running_hub

from stackctl.cli import make_app

from .fuzz import outcome, touched
from .killing import run_command
from .kills import make_template
from .runner import Budget, Outcome

OUT = (
    "../adapter_config.json", "../../../../adapter_config.json", "/adapter_config.json", "/etc/passwd",
    "a/../../../adapter_config.json", "members/../../../registry/registry.yaml", "members/../style/adapter.yaml",
    "..\\..\\adapter_config.json", "C:\\adapter_config.json", "./adapter_config.json", "a//adapter_config.json",
    "adapter_config.json/adapter_config.json", "~/adapter_config.json", "dev/null/adapter_config.json", "con",
    "nul.json", ".git/config", "adapter_config.json\0", "a\nb/adapter_config.json", "\x1b[31m/adapter_config.json", "",
    "a" * 5000 + "/adapter_config.json", "é/adapter_config.json", "registry/registry.yaml",
    "%2e%2e/adapter_config.json",
)  # fmt: skip
"""Names of files that a repo may have if its server does not care."""


def make_repos(folder: Path, hub: HubServer) -> dict[str, dict[str, bytes]]:
    """What a push makes of an adapter, and of a stack with its members: the files by their names."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: F401 (once, not in each process)

    make_template(folder / "mine")
    for what, repo in (("instruct", "me/instruct"), ("both", "me/both")):
        ended = run_command(["push", what, repo, "--members", "--base-id", "acme/tiny"], folder / "mine")
        assert ended.code == 0, ended.said
    make_registry(folder / "template" / "registry", make_base("llama"))
    return {name: dict(repo.files) for name, repo in hub.repos.items()}


def try_repo(
    whole: dict[str, dict[str, bytes]], hub: HubServer, folder: Path, chance: random.Random
) -> tuple[int | None, list[str]]:
    """Pull a repo of which something is hostile. Returns how it ended, and what was wrong with that."""
    name = chance.choice(list(whole))
    files, what = spoil(whole[name], chance)
    hub.repo(name).commit(files, message=what)
    place = folder / "place"
    for used in (place, folder / "hf"):
        shutil.rmtree(used, ignore_errors=True)
    shutil.copytree(folder / "template", place)
    before = tree(place)
    ended = run_command(["pull", name], place, prepare=functools.partial(contain, also=folder / "hf"))
    problem = ill_mannered(ended.code, ended.said, hub=True)
    problem = problem or touched(before, tree(place), failed=bool(ended.code))
    return ended.code, [f"pull {name} with {what}: {problem}\n{ended.said[-1500:]}"] if problem else []


def spoil(files: dict[str, bytes], chance: random.Random) -> tuple[dict[str, bytes], str]:
    """A repo's files with something wrong about them, and what that is."""
    path = chance.choice([name for name in files if name != ".gitattributes"])
    rest = {name: data for name, data in files.items() if name != path}
    match chance.randrange(6):
        case 0:
            name = chance.choice(OUT)
            return {**files, name: files[path]}, f"{path} as {name!r}, too"
        case 1:
            name = chance.choice(OUT)
            return {**rest, name: files[path]}, f"{path} as {name!r}"
        case 2:
            return rest, f"no {path}"
        case 3:
            changed = mutate(files[path], chance)
        case _:
            changed = mutate_file(path, files[path], chance)
    return {**rest, path: changed}, f"{path} as {changed[:600]!r}"


def repos(budget: Budget) -> Outcome:
    """Hostile repos, pulled one after the other."""
    make_app()
    codes, failures = Counter[int | None](), list[str]()
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        connect(hub, budget.folder / "hf", patch)
        whole = make_repos(budget.folder, hub)
        while budget.is_left and len(failures) < 10:
            code, wrong = try_repo(whole, hub, budget.folder, budget.random)
            codes[code] += 1
            failures += wrong
    return outcome(codes, failures)
