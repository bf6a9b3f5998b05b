"""Runs of training that are not finished: where one keeps its saves, and which there are."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import StackctlError
from stackctl.registry.store import Registry
from stackctl.storage import atomic, files
from stackctl.storage.locks import locked

_WHOLE = "stackctl_save.json"
"""Written last into a save: its files and their sizes."""
_HELD_TIMEOUT = 3.0
"""Seconds to wait for a run of the same name: enough for one that was killed to be gone, too few to queue."""


@dataclass(frozen=True)
class RunFolder:
    """Where a run of training keeps its saves until the adapter is registered."""

    path: Path

    @property
    def checkpoints(self) -> list[Path]:
        """The finished saves, oldest first: those whose files are all there, as long as they were written."""
        found = [p for p in self.path.glob("checkpoint-*") if p.name[11:].isdecimal() and _is_whole(p)]
        return sorted(found, key=step_of)

    def save_at(self, step: int) -> Path:
        """The folder of a save; Trainer chooses the name."""
        return self.path / f"checkpoint-{step}"

    def finish(self, save: Path) -> None:
        """Flush a save to the disk, and only then say that it is one."""
        sizes = {}
        for path in sorted(p for p in save.rglob("*") if p.is_file() and p.name != _WHOLE):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            sizes[path.relative_to(save).as_posix()] = path.stat().st_size
        atomic.write_atomic(save / _WHOLE, json.dumps(sizes, indent=2))

    def sweep(self) -> None:
        """Remove what a kill left of saves that were being written, or removed."""
        whole = set(self.checkpoints)
        for path in self.path.glob("checkpoint-*"):
            if path not in whole:
                files.remove_tree(path)

    @property
    def signature(self) -> dict[str, Any]:
        return files.read_json_if_any(self.path / "run.json")

    @property
    def on(self) -> list[str]:
        """The labels of what it trains on, as far as the run says."""
        members = self.signature.get("on")
        return [str(m[0]) for m in members if isinstance(m, list) and m] if isinstance(members, list) else []

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """This run is this process's alone.

        Raises:
            Failed: another process trains under that name.
        """
        name = self.path.name
        with locked(self.path.with_name(f".{name}.lock"), f"the training of '{name}'", timeout=_HELD_TIMEOUT):
            yield

    def begin(self, signature: dict[str, Any]) -> None:
        """Write down what the run is; later calls with more are welcome."""
        self.path.mkdir(parents=True, exist_ok=True)
        atomic.write_atomic(self.path / "run.json", json.dumps(signature, indent=2))


def step_of(save: Path) -> int:
    """The optimizer step after which something was saved."""
    return int(save.name.rpartition("-")[2])


def _is_whole(save: Path) -> bool:
    try:
        sizes = files.read_json(save / _WHOLE)
        return all((save / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, StackctlError):
        return False


def run_folder(registry: Registry, name: str) -> RunFolder:
    """The run folder of an adapter's name."""
    return RunFolder(registry.root / "runs" / name)


def unfinished_runs(registry: Registry) -> Iterator[dict[str, Any]]:
    """What ``ls`` shows under runs: training that has begun and is not registered."""
    for folder in sorted((registry.root / "runs").glob("[!.]*")):
        if folder.is_dir():
            run = RunFolder(folder)
            saves = run.checkpoints
            step = step_of(saves[-1]) if saves else 0
            yield {"name": folder.name, "path": str(folder), "step": step, "saves": len(saves), "on": run.on}
