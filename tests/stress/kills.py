"""Kill commands at every moment, and look whether the registry is as it was before or as it should be after."""

from __future__ import annotations

import contextlib
import importlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from checkpoints import hub_base, make_registry, register, write_checkpoint
from hub_server import connect, running_hub

from stackctl.cli import make_app
from stackctl.lora.checkpoint import read_checkpoint
from stackctl.registry.remove import remove_entry
from stackctl.registry.resolve import resolve_expression
from stackctl.registry.stacks import save_stack
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry

from .killing import Ended, Kill, run_command, run_light
from .runner import Budget, Outcome


@dataclass(frozen=True)
class Scenario:
    """A command, and what must have come of it once it was run to its end."""

    name: str
    arguments: tuple[str, ...]
    done: Callable[[Path], bool]
    """Given the working folder: whether the command has done its work."""
    code_again: int = 0
    """How the command ends when it was killed after its work was done."""
    damage: Callable[[Path], None] = lambda _: None
    """What happens to the working folder before."""
    damaged: str = ""
    """The version that ``damage`` leaves without whole files, until the command has done its work."""
    run: Callable[..., Ended] = run_light
    """What runs its command."""


def adapters(folder: Path, name: str) -> list[int]:
    """The versions of an adapter that are registered."""
    adapter = Registry(folder / "registry").find_adapter(name)
    return [version.version for version in adapter.versions] if adapter else []


def make_template(folder: Path) -> None:
    """A registry with style@1, style@2, instruct@1 on style@1, the stack ``both``; beside it a checkpoint to add."""
    registry = make_registry(folder / "registry", hub_base())
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    register(registry, "instruct", ["style@1"], seed=3)
    save_stack(registry, "both", resolve_expression(registry, "style@1+instruct"))
    register(registry, "free", seed=6)
    register(registry, "old", seed=5)
    remove_entry(registry, "old")
    shutil.copytree(registry.root / "weights" / "style", folder / "backup" / "style")
    write_checkpoint(folder / "new", seed=4)
    (folder / "new" / "tokenizer.json").write_text("{}")


def lose(folder: Path) -> None:
    """What a clone has of style@2: its entry."""
    shutil.rmtree(folder / "registry" / "weights" / "style" / "2")


def corrupt(folder: Path) -> None:
    """Both files of style@2 are others now; a file beside them is as it was."""
    place = folder / "registry" / "weights" / "style" / "2"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (place / name).write_bytes(b"rotten " + (place / name).read_bytes()[7:])
    (place / "notes.txt").write_text("mine")


def _is_whole(folder: Path) -> bool:
    return verify_registry(Registry(folder / "registry"), {"style@2"})[1] == []


def _fill_cache(folder: Path) -> None:
    """Logs of a finished run, tokenised data, a converted model."""
    for place in ("registry/logs/style/2", "cache/tokens/0123abcd", "cache/bases/gguf-1"):
        (folder / place / "deep").mkdir(parents=True)
        (folder / place / "file").write_text("x")
        (folder / place / "deep" / "file").write_text("x")


def _is_swept(folder: Path) -> bool:
    places = ("registry/logs/style", "cache/tokens/0123abcd", "cache/bases/gguf-1", "registry/weights/old")
    return not any((folder / place).exists() for place in places)


def _is_exported(folder: Path) -> bool:
    """A whole adapter, or nothing at all under its name."""
    out = folder / "out"
    return out.exists() and read_checkpoint(out).is_lora and all(path.stat().st_size for path in out.iterdir())


LIGHT = (
    Scenario("init", ("init", "other"), lambda f: (f / "other" / "registry.yaml").is_file()),
    Scenario("add", ("add", "style", "new"), lambda f: adapters(f, "style") == [1, 2, 3]),
    Scenario("add --on", ("add", "tone", "new", "--on", "both"), lambda f: adapters(f, "tone") == [1]),
    Scenario("add --link", ("add", "tone", "new", "--link"), lambda f: adapters(f, "tone") == [1]),
    Scenario(
        "compose",
        ("compose", "instruct+style", "--name", "s"),
        lambda f: Registry(f / "registry").find_stack("s") is not None,
    ),
    Scenario("export", ("export", "both", "--format", "peft", "--out", "out"), _is_exported, 2, run=run_command),
    Scenario("use", ("use", "both"), lambda f: Registry(f / "registry").settings().current == "both"),
    Scenario("rm a version", ("rm", "style@2"), lambda f: adapters(f, "style") == [1], code_again=3),
    Scenario("rm an adapter", ("rm", "free"), lambda f: not adapters(f, "free"), code_again=3),
    Scenario("gc", ("gc",), lambda f: not (f / "registry" / "weights" / "old").exists()),
    Scenario("gc of everything", ("gc", "--runs", "--logs", "--cache"), _is_swept, damage=_fill_cache),
    Scenario("repair", ("verify", "--repair", "--from", "backup"), _is_whole, damage=lose, damaged="style@2"),
    Scenario(
        "repair in place", ("verify", "--repair", "--from", "backup"), _is_whole, damage=corrupt, damaged="style@2"
    ),
    Scenario("rm a stack", ("rm", "both"), lambda f: Registry(f / "registry").find_stack("both") is None, code_again=3),
)


_FROM_HUB = (
    Scenario("pull", ("pull", "me/style", "--name", "mine"), lambda f: adapters(f, "mine") == [2]),
    Scenario("pull a stack", ("pull", "me/far"), lambda f: Registry(f / "registry").find_stack("far") is not None),
    Scenario("pull what is lost", ("pull", "me/style"), _is_whole, damage=lose, damaged="style@2"),
    Scenario("repair from the Hub", ("verify", "--repair"), _is_whole, damage=corrupt, damaged="style@2"),
)
FROM_HUB = tuple(replace(scenario, run=run_command) for scenario in _FROM_HUB)  # only this process knows where it is


@contextlib.contextmanager
def hub_with(template: Path) -> Iterator[None]:
    """A Hub on this machine that holds style@2 in ``me/style``, and in ``me/far`` a stack of what is not here."""
    importlib.import_module("stackctl.hub.pull")  # here, as make_app, instead of in each process
    with running_hub() as server, pytest.MonkeyPatch.context() as patch:
        connect(server, template.parent / "hf", patch)
        there = template.parent / "there"
        registry = make_registry(there / "registry", hub_base())
        for name, on, seed in (("first", [], 11), ("second", ["first@1"], 12)):
            register(registry, name, on, seed=seed)
        save_stack(registry, "far", resolve_expression(registry, "first+second"))
        for folder, what, repo in ((there, "far", "me/far"), (template, "style@2", "me/style")):
            ended = run_command(["push", what, repo, "--members"], folder)
            assert ended.code == 0, ended.said
        yield


def kill_and_look(template: Path, place: Path, scenario: Scenario, step: int) -> tuple[bool, list[str]]:
    """Kill a scenario's command before a step. Returns whether it came to that, and everything that was wrong then."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)
    scenario.damage(place)
    arguments = list(scenario.arguments)
    ended = scenario.run(arguments, place, Kill(step))
    if ended.code is not None:
        wrong = [] if ended.code == 0 else [f"ended with {ended.code}: {ended.said}"]
        return False, [f"{scenario.name}, not killed: {text}" for text in wrong]
    was_done = scenario.done(place)
    wrong = list(_wrong(place, but=scenario.damaged))
    again = scenario.run(arguments, place)
    if again.code != (scenario.code_again if was_done else 0) and again.code != 0:
        wrong.append(f"the same command again ended with {again.code}: {again.said}")
    if not scenario.done(place):
        wrong.append("the same command again did not do its work")
    wrong += _wrong(place)
    wrong += [f"{path.relative_to(place)} was left" for path in place.rglob(".tmp-*")]
    run_light(["gc"], place)
    wrong += [*_wrong(place), *(f"gc left {path}" for path in weights_without_entry(place / "registry"))]
    return True, [f"{scenario.name}, killed before step {step}: {text}" for text in wrong]


def _wrong(place: Path, but: str = "") -> Iterator[str]:
    registry = Registry(place / "registry")
    for problem in verify_registry(registry)[1]:
        if problem["what"] != but:
            yield f"{problem['what']}: {problem['message']}"


def weights_without_entry(root: Path) -> set[Path]:
    """Weights that belong to nothing: after ``gc`` there are none."""
    registry = Registry(root)
    known = {registry.weights_path(version) for adapter in registry.adapters() for version in adapter.versions}
    return {path.resolve() for path in (root / "weights").glob("*/*")} - known


def kills(budget: Budget) -> Outcome:
    """Every command of the light floor, at every step again and again in another order."""
    make_app()  # imports them all here, instead of in each process
    template = budget.folder / "template"
    make_template(template)
    with hub_with(template):
        return _kill_all(budget, template, LIGHT + FROM_HUB)


def _kill_all(budget: Budget, template: Path, scenarios: tuple[Scenario, ...]) -> Outcome:
    killed, lost, failures = dict.fromkeys((s.name for s in scenarios), 0), 0, []
    pending: list[tuple[Scenario, int]] = []
    while budget.is_left and len(failures) < 10:
        if not pending:
            pending = [(s, step) for s in scenarios for step in range(1, count_steps(template, budget.folder, s) + 1)]
            budget.random.shuffle(pending)
        scenario, step = pending.pop()
        was_killed, wrong = kill_and_look(template, budget.folder / "place", scenario, step)
        killed[scenario.name] += was_killed
        lost += bool(was_killed and wrong)
        failures += wrong
    total = sum(killed.values())
    each = " · ".join(f"{name} {count}" for name, count in killed.items())
    return Outcome(f"kills survived {total - lost} of {total} · {each}", failures)


def count_steps(template: Path, folder: Path, scenario: Scenario) -> int:
    """How many steps a scenario's command makes when nobody kills it."""
    place = folder / "counting"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)
    scenario.damage(place)
    ended = scenario.run(list(scenario.arguments), place)
    assert ended.code == 0, f"{scenario.name} ended with {ended.code}: {ended.said}"
    assert scenario.done(place), scenario.name
    return len(ended.steps)
