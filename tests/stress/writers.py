"""Many processes on one registry at once: nothing that a command reported is lost, and no number means two things."""

from __future__ import annotations

import json
import multiprocessing
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import hub_base, make_registry, register, write_checkpoint

from stackctl.cli import make_app
from stackctl.registry.checkpoint_files import folder_digest
from stackctl.registry.store import Registry
from stackctl.registry.verify import verify_registry

from .killing import run_command
from .kills import hub_with
from .runner import Budget, Outcome

WORKERS, COMMANDS = 6, 12
_NAMES = ("style", "tone", "voice")


@dataclass
class Worker:
    """One of those who write: what it was told of its work, and what went wrong."""

    registry: Path
    place: Path
    chance: random.Random
    added: dict[str, str] = field(default_factory=dict)
    removed: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def command(self, *arguments: str, codes: tuple[int, ...] = (0,)) -> tuple[int | None, str]:
        """Run a command on the shared registry; an exit code that cannot be is something that went wrong."""
        ended = run_command([*arguments, "--registry", str(self.registry)], self.place)
        if ended.code not in codes:
            self.wrong.append(f"{' '.join(arguments)} ended with {ended.code}: {ended.said}")
        return ended.code, ended.said.strip()

    def add(self) -> None:
        name, new = self.chance.choice(_NAMES), self.place / "new"
        write_checkpoint(new, seed=self.chance.randrange(1 << 31))
        code, label = self.command("add", name, str(new), "-q")
        if code == 0:
            self.added[label] = str(folder_digest(new))
            shutil.copytree(new, self.place / "backup" / label)

    def mine(self) -> str | None:
        left = sorted(set(self.added) - self.removed)
        return self.chance.choice(left) if left else None

    def remove(self) -> None:
        """Exit code 2: a stack has it."""
        if (label := self.mine()) and self.command("rm", label, codes=(0, 2))[0] == 0:
            self.removed.add(label)

    def compose(self) -> None:
        """Exit code 3: one of them is not there yet, or any more; 5: somebody damaged it just now."""
        name = f"s{self.chance.randrange(4)}"
        self.command("compose", "+".join(self.chance.sample(_NAMES, 2)), "--name", name, codes=(0, 3, 5))

    def mend(self) -> None:
        """Damage one of its own, and bring it back; ``gc`` may run at the same time."""
        if label := self.mine():
            folder = self.registry / "weights" / label.replace("@", "/")
            if self.chance.random() < 0.5:
                shutil.rmtree(folder)
            else:
                (folder / "adapter_model.safetensors").write_bytes(b"rotten")
            self.command("verify", label, "--repair", "--from", str(self.place / "backup"))

    def pull(self) -> None:
        self.command("pull", self.chance.choice(("me/style", "me/far")))

    def collect(self) -> None:
        self.command("gc")

    def look(self) -> None:
        code, said = self.command("ls", "--json")
        if code == 0 and json.loads(said)["schema"] != 1:
            self.wrong.append(f"ls said {said}")


_DEEDS: tuple[Callable[[Worker], None], ...] = (
    Worker.add, Worker.add, Worker.add, Worker.remove, Worker.compose, Worker.mend, Worker.pull, Worker.collect,
    Worker.look,
)  # fmt: skip


def work(registry: Path, place: Path, seed: str, commands: int) -> Worker:
    """All that one worker does, one command after the other."""
    place.mkdir(parents=True)
    worker = Worker(registry, place, random.Random(seed))
    for _ in range(commands):
        worker.chance.choice(_DEEDS)(worker)
    return worker


def work_together(registry: Path, place: Path, seed: str, workers: int, commands: int) -> tuple[int, list[str]]:
    """Several workers at once. Returns how many versions they added, and everything that was wrong afterwards."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        each = [(registry, place / str(number), f"{seed} {number}", commands) for number in range(workers)]
        done = pool.starmap(work, each)
    wrong = [text for worker in done for text in worker.wrong]
    labels = [label for worker in done for label in worker.added]
    wrong += [f"{label} was given twice" for label in set(labels) if labels.count(label) > 1]
    run_command(["gc", "--registry", str(registry)], place)
    now = Registry(registry)
    here = {f"{a.name}@{v.version}": v.digest for a in now.adapters() for v in a.versions}
    for worker in done:
        wrong += [
            f"{label} is lost"
            for label, d in worker.added.items()
            if (here.get(label) == d) == (label in worker.removed)
        ]
    wrong += [f"{problem['what']}: {problem['message']}" for problem in verify_registry(now)[1]]
    wrong += [f"{path} was left" for path in registry.rglob(".tmp-*")]
    return len(labels), wrong


def make_shared(folder: Path) -> Path:
    """A registry with style@1 and style@2, for several to work on."""
    registry = make_registry(folder / "registry", hub_base())
    register(registry, "style", seed=1)
    register(registry, "style", seed=2)
    return registry.root


def writers(budget: Budget) -> Outcome:
    """Round after round, each on the registry as the one before left it."""
    make_app()
    rounds, versions, failures = 0, 0, list[str]()
    shared = budget.folder / "shared"
    root = make_shared(shared)
    with hub_with(shared):
        while budget.is_left and not failures:
            place = budget.folder / "round"
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            added, failures = work_together(root, place, str(budget.random.random()), WORKERS, COMMANDS)
            rounds, versions = rounds + 1, versions + added
    line = f"{WORKERS} at once, {rounds * WORKERS * COMMANDS} commands, {versions} versions added"
    return Outcome(f"{line}, {'something' if failures else 'nothing'} lost", failures)
