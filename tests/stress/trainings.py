"""Kill trainings, each several times over, and look whether ``--resume`` ends with the weights of one that was not."""

from __future__ import annotations

import json
import random
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from oracle import write_jsonl
from tiny import TinyModels, random_adapter
from tiny_registry import CHAT, TEXTS

from stackctl.registry.store import Registry

from .killing import Ended, Kill, run_engine
from .kills import weights_without_entry
from .runner import Budget, Outcome

COMMAND = (
    "train", "new", "--on", "style", "--data", "data.jsonl", "--eval-data", "held-out.jsonl", "--rank", "4",
    "--batch-size", "2", "--epochs", "2", "--dropout", "0.3", "--learning-rate", "0.003", "--save-steps", "1",
)  # fmt: skip
PLACES = {
    "in a save": r"/runs/new/checkpoint-",
    "while registering": r"/registry/(weights/(\.tmp-|new)|adapters|\.lock)",
}
ANY_MOMENT = "at any moment"
_MOST_KILLS = 4


@dataclass(frozen=True)
class Whole:
    """What a training makes that nobody kills; ``steps`` are those on the disk, by the place that they are counted in.

    ``made`` is what it registers, without what depends on the clock.
    """

    made: dict[str, object]
    seconds: float
    steps: dict[str, int]


def make_template(folder: Path, base: Path) -> Whole:
    """A registry with an adapter to train on, and data; trained once, in a copy."""
    folder.mkdir()
    random_adapter(base, folder / "style", seed=1)
    write_jsonl(folder / "data.jsonl", CHAT)
    write_jsonl(folder / "held-out.jsonl", TEXTS)
    for arguments in (["init"], ["base", "add", "tiny", str(base)], ["add", "style", "style"]):
        _done(run_engine(arguments, folder))
    place = folder.with_name("whole")
    shutil.copytree(folder, place)
    started = time.monotonic()
    ended = _done(run_engine([*COMMAND], place))
    seconds = time.monotonic() - started
    steps = {name: sum(bool(re.search(where, path)) for path in ended.steps) for name, where in PLACES.items()}
    assert min(steps.values()) > 5, "it is counted where something happens"
    return Whole(_made(place), seconds, steps)


def kill_and_resume(
    template: Path, place: Path, whole: Whole, moments: Sequence[str], chance: random.Random
) -> tuple[Counter[str], list[str]]:
    """Train with ``--resume`` until it is done, killed at some moments on the way unless it is done before.

    Returns how often it was killed by when that was, and everything that was wrong.
    """
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place)
    command = [*COMMAND, "--resume"]
    kills, wrong = Counter[str](), list[str]()
    for when in moments:
        if when in PLACES:
            number = chance.randint(1, whole.steps[when])
            ended = run_engine(command, place, Kill(number, PLACES[when]))
            told = f"killed {when}, before step {number}"
        else:
            seconds = chance.uniform(0, whole.seconds)
            ended = run_engine(command, place, seconds)
            told = f"killed after {seconds:.3f} s"
        if ended.code is not None:
            break  # it was done before it came to that
        kills[when] += 1
        wrong += [f"{told}: {text}" for text in _wrong(place, done=False)]
    else:
        ended = run_engine(command, place)
    if ended.code:
        return kills, [*wrong, f"resumed after {dict(kills)}, it ended with {ended.code}: {ended.said}"]
    if (made := _made(place)) != whole.made:
        wrong.append(f"resumed after {dict(kills)}, it made {made} instead of {whole.made}")
    wrong += _wrong(place, done=True)
    wrong += [f"{path.relative_to(place)} was left" for path in place.rglob(".tmp-*")]
    _done(run_engine(["gc"], place))
    return kills, wrong + [f"gc left {path}" for path in weights_without_entry(place / "registry")]


def _made(place: Path) -> dict[str, object]:
    """The versions that there are, with the newest one's digest, numbers and losses."""
    adapter = Registry(place / "registry").find_adapter("new")
    assert adapter
    version = adapter.newest()
    run = version.run
    assert run
    return {
        "versions": [v.version for v in adapter.versions],
        "digest": version.digest,
        "numbers": (run.steps, run.tokens, run.supervised_tokens, run.loss, run.eval_loss, run.kept_step),
        "losses": (place / "registry" / "weights" / "new" / "1" / "training_log.jsonl").read_text(),
    }


def _wrong(place: Path, *, done: bool) -> Iterator[str]:
    """What commands say of a registry that they should not, or do not say."""
    verified = run_engine(["verify"], place)
    if verified.code:
        yield f"verify: {verified.said}"
    listed = json.loads(_done(run_engine(["ls", "--json", "-q"], place)).said)
    versions = [v["version"] for adapter in listed["adapters"] if adapter["name"] == "new" for v in adapter["versions"]]
    if versions not in ([[1]] if done else [[], [1]]):
        yield f"there are the versions {versions}"
    saves = [int(p.parent.name[11:]) for p in place.glob("registry/runs/new/checkpoint-*/stackctl_save.json")]
    shown = {run["name"]: run["step"] for run in listed["runs"]}
    if done and shown:
        yield f"ls shows what is done as unfinished: {shown}"
    if saves and not versions and shown != {"new": max(saves)}:
        yield f"ls shows {shown}, and there are saves of {sorted(saves)}"


def _done(ended: Ended) -> Ended:
    assert ended.code == 0, ended.said
    return ended


def trainings(budget: Budget) -> Outcome:
    """Trainings of a tiny model, one after the other."""
    template = budget.folder / "template"
    whole = make_template(template, TinyModels(budget.folder)("llama"))
    killed, done, failures = Counter[str](), 0, list[str]()
    while budget.is_left and len(failures) < 10:
        moments = budget.random.choices([*PLACES, ANY_MOMENT], k=budget.random.randint(1, _MOST_KILLS))
        kills, wrong = kill_and_resume(template, budget.folder / "place", whole, moments, budget.random)
        killed += kills
        done += not wrong
        failures += wrong
    each = " · ".join(f"{when} {count}" for when, count in sorted(killed.items()))
    return Outcome(f"trainings killed {killed.total()} times · {each} · ended with the same weights {done}", failures)
