"""A disk that says no from some step of a command on: full, read-only, not allowed, broken. Nothing half-done stays."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hostile import CHANGES, ill_mannered, tree

from stackctl.cli import make_app
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry
from stackctl.storage.atomic import STAGING_PREFIX

from .kills import LIGHT, Scenario, count_steps, make_template
from .runner import Budget, Outcome

ERRORS = {
    "full": errno.ENOSPC, "over its quota": errno.EDQUOT, "read-only": errno.EROFS, "not allowed": errno.EACCES,
    "broken": errno.EIO,
}  # fmt: skip
SCENARIOS = tuple(scenario for scenario in LIGHT if not scenario.damaged)
"""A repair that is refused is a problem that verify lists, not an error."""
_STILL_REMOVE = (errno.ENOSPC, errno.EDQUOT)
_REMOVALS = ("os.remove", "os.rmdir", "shutil.rmtree")


def refuse(code: int, after: int, place: Path) -> None:
    """From its step ``after`` on, let every write of this process below ``place`` fail; a full disk still removes."""
    steps = 0
    still_removes = code in _STILL_REMOVE

    def step(path: Any) -> None:
        nonlocal steps
        steps += 1
        if steps >= after:
            raise OSError(code, os.strerror(code), str(path))

    def is_inside(path: Any) -> bool:
        return isinstance(path, str | bytes | os.PathLike) and Path(os.fsdecode(path)).absolute().is_relative_to(place)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and is_inside(path):
                step(path)
        elif event in CHANGES and not (still_removes and event in _REMOVALS):
            path = arguments[CHANGES[event] - 1]
            if is_inside(path):
                step(path)

    fsync = os.fsync

    def checked(descriptor: int) -> None:
        step(descriptor)
        fsync(descriptor)

    os.fsync = checked
    sys.addaudithook(hook)


def refuse_and_look(template: Path, place: Path, scenario: Scenario, code: int, after: int) -> tuple[bool, list[str]]:
    """Run a scenario's command on a disk that refuses. Returns whether it came to that, and everything wrong then."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place, symlinks=True)
    scenario.damage(place)
    before = tree(place)
    arguments = list(scenario.arguments)
    ended = scenario.run(arguments, place, prepare=functools.partial(refuse, code, after))
    if ended.code == 0:
        for folder in place.glob("registry/weights/*"):
            with contextlib.suppress(OSError):  # an empty folder that could not be removed does no harm
                folder.rmdir()
        return False, [] if scenario.done(place) else [f"{scenario.name} said that it was done, and was not"]
    wrong = list(_wrong(place, before, can_remove=code in _STILL_REMOVE))
    if ended.code != 1:
        wrong.append(f"ended with {ended.code}")
    wrong += [problem] if (problem := ill_mannered(ended.code, ended.said)) else []
    was_done = scenario.done(place)
    again = scenario.run(arguments, place)
    if again.code not in (0, scenario.code_again if was_done else 0) or not scenario.done(place):
        wrong.append(f"the same command again, on a disk that works, ended with {again.code}: {again.said}")
    wrong += [f"verify afterwards: {problem}" for problem in verify_registry(Registry(place / "registry"))[1]]
    return True, [f"{scenario.name}, {os.strerror(code)} from step {after}: {text}\n{ended.said}" for text in wrong]


def _wrong(place: Path, before: dict[str, bytes], *, can_remove: bool) -> Iterator[str]:
    registry = Registry(place / "registry")
    for problem in verify_registry(registry)[1]:
        yield f"{problem['what']}: {problem['message']}"
    known = {registry.weights_path(version) for adapter in registry.adapters() for version in adapter.versions}
    left = {*place.glob("registry/weights/*/*"), *place.rglob(f"{STAGING_PREFIX}*")} - known
    for path in left if can_remove else ():
        if str(path.relative_to(place)) not in before:
            yield f"{path.relative_to(place)} was left, of something that is not registered"


def refusals(budget: Budget) -> Outcome:
    """Every command of the light floor, refused at every step, again and again in another order."""
    make_app()
    template = budget.folder / "template"
    make_template(template)
    counted, failures = Counter[str](), list[str]()
    pending: list[tuple[Scenario, str, int]] = []
    steps = {scenario.name: count_steps(template, budget.folder, scenario) for scenario in SCENARIOS}
    while budget.is_left and len(failures) < 10:
        if not pending:
            pending = [(s, kind, n) for s in SCENARIOS for kind in ERRORS for n in range(1, steps[s.name] + 1)]
            budget.random.shuffle(pending)
        scenario, kind, after = pending.pop()
        refused, wrong = refuse_and_look(template, budget.folder / "place", scenario, ERRORS[kind], after)
        counted[kind] += refused
        failures += wrong
    each = " · ".join(f"{kind} {count}" for kind, count in counted.items())
    return Outcome(f"refusals survived {counted.total() - len(failures)} of {counted.total()} · {each}", failures)
