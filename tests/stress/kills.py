"""Kill commands at every moment, and look whether the registry is as it was before or as it should be after."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from checkpoints import make_registry, register, write_checkpoint

from stackctl.cli import make_app
from stackctl.registry import Registry

from .killing import run_command
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


def adapters(folder: Path, name: str) -> list[int]:
    """The versions of an adapter that are registered."""
    adapter = Registry(folder / "registry").find_adapter(name)
    return [version.version for version in adapter.versions] if adapter else []


def make_template(folder: Path) -> None:
    """A registry with style@1, style@2, instruct@1 on style@1, the stack ``both``; beside it a checkpoint to add."""
    registry = make_registry(folder / "registry")
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    register(registry, "instruct", ["style@1"], seed=3)
    registry.save_stack("both", registry.resolve("style@1+instruct"))
    register(registry, "free", seed=6)
    register(registry, "old", seed=5)
    registry.remove("old")
    write_checkpoint(folder / "new", seed=4)
    (folder / "new" / "tokenizer.json").write_text("{}")


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
    Scenario("use", ("use", "both"), lambda f: Registry(f / "registry").settings().current == "both"),
    Scenario("rm a version", ("rm", "style@2"), lambda f: adapters(f, "style") == [1], code_again=3),
    Scenario("rm an adapter", ("rm", "free"), lambda f: not adapters(f, "free"), code_again=3),
    Scenario("gc", ("gc",), lambda f: not (f / "registry" / "weights" / "old").exists()),
    Scenario("rm a stack", ("rm", "both"), lambda f: Registry(f / "registry").find_stack("both") is None, code_again=3),
)


def kill_and_look(template: Path, place: Path, scenario: Scenario, step: int) -> tuple[bool, list[str]]:
    """Kill a scenario's command before a step. Returns whether it came to that, and everything that was wrong then."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)
    arguments = list(scenario.arguments)
    ended = run_command(arguments, place, step)
    if ended.code is not None:
        wrong = [] if ended.code == 0 else [f"ended with {ended.code}: {ended.said}"]
        return False, [f"{scenario.name}, not killed: {text}" for text in wrong]
    wrong = list(_wrong(place))
    was_done = scenario.done(place)
    again = run_command(arguments, place)
    if again.code != (scenario.code_again if was_done else 0) and again.code != 0:
        wrong.append(f"the same command again ended with {again.code}: {again.said}")
    if not scenario.done(place):
        wrong.append("the same command again did not do its work")
    wrong += _wrong(place)
    wrong += [f"{path.relative_to(place)} was left" for path in place.rglob(".tmp-*")]
    run_command(["gc"], place)
    wrong += [*_wrong(place), *(f"gc left {path}" for path in _without_entry(place / "registry"))]
    return True, [f"{scenario.name}, killed before step {step}: {text}" for text in wrong]


def _wrong(place: Path) -> Iterator[str]:
    registry = Registry(place / "registry")
    for problem in registry.verify()[1]:
        yield f"{problem['what']}: {problem['message']}"


def _without_entry(root: Path) -> set[Path]:
    """Weights that belong to nothing: after ``gc`` there are none."""
    registry = Registry(root)
    known = {registry.weights_path(version) for adapter in registry.adapters() for version in adapter.versions}
    return {path.resolve() for path in (root / "weights").glob("*/*")} - known


def kills(budget: Budget) -> Outcome:
    """Every command of the light floor, at every step again and again in another order."""
    make_app()  # imports them all here, instead of in each process
    template = budget.folder / "template"
    make_template(template)
    return _kill_all(budget, template, LIGHT)


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
    ended = run_command(list(scenario.arguments), place)
    assert ended.code == 0, f"{scenario.name} ended with {ended.code}: {ended.said}"
    assert scenario.done(place), scenario.name
    return ended.steps
