"""A Python with TRL, which is no dependency of stackctl: its own environment in a cache folder, made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TRL = "1.16.0"
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def trl_python() -> Path:
    """The interpreter of an environment with TRL, and with torch, transformers and PEFT at the versions tested here.

    It is made where it is missing, which fetches some hundred megabytes.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "stackctl-benchmarks" / f"trl-{TRL}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        print(f"making an environment with TRL {TRL} in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        for wanted in (["torch"], [f"trl=={TRL}", "peft"]):
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", CONSTRAINTS]
            subprocess.run([*pip, *wanted], check=True)
        (folder / ".ready").touch()
    return python


def versions(python: Path) -> str:
    """What is compared with: ``trl 1.16.0, peft 0.21.2, …``."""
    code = (
        "from importlib.metadata import version\n"
        "print(', '.join(f'{name} {version(name)}' for name in ('trl', 'peft', 'transformers', 'torch')))"
    )
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
