"""The installed command on the real 135M model: one folder and one cache for the whole session.

What loads torch is started as it is installed once for each command, and then forked off a process that has torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import warm

COMMAND = Path(sys.executable).with_name("stackctl")
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
LOADS_TORCH = {"train", "generate", "compare", "eval"}


@dataclass(frozen=True)
class InstalledCommand:
    """A working directory, an empty home, and the command as it is installed."""

    folder: Path
    home: Path
    base: Path = Path()
    """Where ``base add`` put the base."""
    started: set[str] = field(default_factory=set)
    """Commands that were started as they are installed."""

    def __call__(self, *arguments: object, code: int = 0, stdin: str = "") -> subprocess.CompletedProcess[str]:
        kept = ("PATH", "LANG", "LC_ALL", "TMPDIR", "OMP_NUM_THREADS")
        environment = {name: os.environ[name] for name in kept if name in os.environ}
        environment |= {"HOME": str(self.home), "HF_HUB_OFFLINE": "1"}
        # Threads that spin while they wait, in more processes than there are cores, took 48 s a step instead of one.
        if "PYTEST_XDIST_WORKER" in os.environ:
            environment["OMP_NUM_THREADS"] = "1"
        words = [*map(str, arguments)]
        if words[0] in LOADS_TORCH & self.started and not stdin:
            done = warm.run(words, self.folder, environment, timeout=600)
        else:
            self.started.add(words[0])
            done = subprocess.run(
                [COMMAND, *words],
                cwd=self.folder,
                env=environment,
                input=stdin,
                capture_output=True,
                text=True,
                timeout=600,
            )
        said = f"stackctl {' '.join(words)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == code, said
        assert "Traceback" not in done.stderr, said
        return done

    def json(self, *arguments: object, code: int = 0, stdin: str = "") -> Any:
        """The one document that a command puts on stdout."""
        return json.loads(self(*arguments, "--json", code=code, stdin=stdin).stdout)


@pytest.fixture(scope="session")
def cli(tmp_path_factory: pytest.TempPathFactory) -> InstalledCommand:
    """A registry with the base ``smollm2``, converted once."""
    root = tmp_path_factory.mktemp("e2e")
    found = InstalledCommand(root / "my project", root / "home")
    found.folder.mkdir()
    found.home.mkdir()
    found("init")
    base = found.json("base", "add", "smollm2")
    assert base["name"] == "smollm2"
    assert Path(base["path"]).is_relative_to(found.home)
    return replace(found, base=Path(base["path"]))


@pytest.fixture(scope="session")
def trained(cli: InstalledCommand) -> InstalledCommand:
    """style trained for a few steps, instruct on it, and both composed as ``storyteller``."""
    quick = ("--max-steps", "2", "--batch-size", "1", "--learning-rate", "4e-3", "--max-length", "96")
    cli("train", "style", "--data", EXAMPLES / "style.jsonl", *quick)
    cli("train", "instruct", "--on", "style", "--data", EXAMPLES / "instruct.jsonl", *quick)
    cli("compose", "style+instruct", "--name", "storyteller")
    return cli
