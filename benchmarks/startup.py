"""How long the light commands take beside importing the libraries that any such command needs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.large_registry import large_registry
from benchmarks.timing import compare, parse_runs, run_command, show

_IMPORTS = "import typer, yaml, rich.console"


def main(options: Sequence[str] = ()) -> None:
    runs = parse_runs(options, "startup", 11)
    with tempfile.TemporaryDirectory() as folder:
        registry = large_registry(Path(folder), rank=4)
        stackctl = [sys.executable, "-m", "stackctl"]
        where = ["--registry", str(registry)]
        candidates = {
            f'python -c "{_IMPORTS}"': [sys.executable, "-c", _IMPORTS],
            "stackctl inspect style+instruct": [*stackctl, "inspect", "style+instruct", *where],
            "stackctl compose --dry-run style+instruct": [*stackctl, "compose", "style+instruct", "--dry-run", *where],
            "stackctl ls": [*stackctl, "ls", *where],
            "stackctl --help": [*stackctl, "--help"],
        }
        show(
            compare({name: lambda c=command: run_command(c) for name, command in candidates.items()}, runs),
            f'python -c "{_IMPORTS}"',
        )
