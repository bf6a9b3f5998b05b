"""Copies of a checkpoint: how one is made, and how one is known, by its digest and not by where it lies."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from stackctl.core.errors import Incompatible, NotFound
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, adapter_digest
from stackctl.registry.base_models import read_json
from stackctl.storage.files import sha256_file

# Trainer's own state (pickles, and as large as the optimizer) is of no use to an adapter; pickles are never copied.
_COPIED = {".safetensors", ".json", ".jinja", ".jsonl", ".model", ".txt", ".md"}
_TRAINER_STATE = {"trainer_state.json", "stackctl_counters.json"}


def copy_checkpoint(source: Path, target: Path) -> None:
    """Copy what belongs to an adapter: weights, configuration, tokenizer and notes; no pickles, no folders."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in _COPIED and path.name not in _TRAINER_STATE:
            shutil.copyfile(path, target / path.name)


def folder_digest(folder: Path, sha256: Callable[[Path], str] = sha256_file) -> str | None:
    """The digest of the checkpoint in a folder, fit for use or not; None where its two files are not there to read.

    Args:
        sha256: gives the ``sha256:<hex>`` of a file.
    """
    if (folder / WEIGHTS).is_file():
        with contextlib.suppress(NotFound, Incompatible):
            return adapter_digest(read_json(folder / CONFIG), sha256(folder / WEIGHTS))
    return None


def checkpoint_folders(root: Path) -> Iterator[Path]:
    """A folder and those below it that hold a checkpoint, in a fixed order."""
    for config in sorted(root.rglob(CONFIG)):
        if (config.parent / WEIGHTS).is_file():
            yield config.parent
