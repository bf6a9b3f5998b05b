"""Pythons with the tools that are compared with. None is a dependency of stackctl: each has its own environment.

An environment is made once, in a cache folder, and fetches some hundred megabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


@dataclass(frozen=True)
class Peer:
    """A tool at one version, and what pip is asked for.

    ``alone`` is installed without its own requirements: some of them are for GPUs and would fetch another torch.
    ``pinned`` holds everything to the versions that stackctl is tested with, where the tool allows these.
    """

    package: str
    version: str
    wanted: tuple[str, ...]
    alone: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    pinned: bool = False


TRL = Peer("trl", "1.16.0", ("trl==1.16.0", "peft"), pinned=True)
UNSLOTH = Peer(
    "unsloth",
    "2026.10.9",
    ("transformers<=5.17", "trl<=1.15", "datasets>=4.6,<5", "peft", "psutil", "protobuf", "sentencepiece", "tyro"),
    alone=("unsloth==2026.10.9", "unsloth_zoo==2026.10.9", "hf_transfer"),
)
LLAMA_FACTORY = Peer("llamafactory", "0.9.5", ("llamafactory==0.9.5",), removed=("torchaudio", "torchvision"))
"""Its torchvision and torchaudio are for pictures and sound, and do not fit every torch."""


def peer_python(peer: Peer) -> Path:
    """The interpreter of an environment with ``peer`` and stackctl's version of torch; made where it is missing."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "stackctl-benchmarks" / f"{peer.package}-{peer.version}"
    python = folder / "bin" / "python"
    if not (folder / ".ready").is_file():
        print(f"making an environment with {peer.package} {peer.version} in {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-c", CONSTRAINTS, "torch"], check=True)
        pins = ["-c", CONSTRAINTS] if peer.pinned else [_torch_pin()]
        subprocess.run([*pip, "install", *pins, *peer.wanted], check=True)
        if peer.alone:
            subprocess.run([*pip, "install", "--no-deps", *peer.alone], check=True)
        if peer.removed:
            subprocess.run([*pip, "uninstall", "--yes", *peer.removed], check=True)
        (folder / ".ready").touch()
    return python


def _torch_pin() -> str:
    """``torch==2.13.0`` as it stands in the constraints."""
    return next(line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))


def versions(python: Path, package: str) -> str:
    """What is compared with: ``trl 1.16.0, peft 0.21.2, …``."""
    code = (
        "from importlib.metadata import version\n"
        f"print(', '.join(f'{{name}} {{version(name)}}' for name in ('{package}', 'peft', 'transformers', 'torch')))"
    )
    return subprocess.run([python, "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
