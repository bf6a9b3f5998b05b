"""The saves of an unfinished run: all ranks begin one, write it and end it together, and only then is it removed.

A rank that writes does not wait for the others, so that none may begin before the folder is there, and none may remove
the folder, or call it whole, before all have agreed that they are done with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackctl.core.errors import Failed, first_line
from stackctl.engine.training.distributed import any_of, keeps_parts
from stackctl.jobs import ranks
from stackctl.registry.run_folders import RunFolder
from stackctl.storage import files

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What writing raises: torch and safetensors wrap what the system said."""


class RunSaves(TrainerCallback):
    """Where Trainer's saves lie, and which one is being written; a save is one when :meth:`on_save` has ended."""

    def __init__(self, folder: RunFolder, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._writing: Path | None = None

    def begin(self, save: Path) -> None:
        """Make a save's folder. Each rank may write into it afterwards.

        Raises:
            Failed: it cannot be made.
        """
        self._writing, error = save, None
        if ranks.rank() == 0:
            try:
                save.mkdir(parents=True, exist_ok=True)
            except OSError as reason:
                error = reason
        self._agree(error)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All of a save was written by this rank."""
        save, error = self._folder.save_at(state.global_step), None
        self._agree(None)
        if ranks.rank() == 0:
            try:
                self._folder.finish(save)
            except OSError as reason:
                error = reason
        self._agree(error)
        self._writing = None

    def fail(self, error: Exception) -> None:
        """Turn what was raised while a save was written into an error of all ranks; at any other time do nothing.

        Raises:
            Failed: the save could not be written.
        """
        if self._writing is None:
            return
        if keeps_parts():  # the others are on the way to an exchange inside of it, and cannot be asked
            raise self._failed(error) from error
        self._agree(error)

    def _agree(self, error: Exception | None) -> None:
        """Go on when all ranks are here; if one of them failed, rank 0 removes the save and all raise.

        Raises:
            Failed: a rank could not write.
        """
        save, self._writing = self._writing, None  # what the exchange itself raises is no failure to write
        failed = any_of(error is not None, self._device)
        self._writing = save
        if not failed:
            return
        problem = self._failed(error)
        if ranks.rank() == 0 and save is not None:
            files.remove_tree(save)
        self._writing = None
        raise problem from error

    def _failed(self, error: Exception | None) -> Failed:
        assert self._writing is not None, "only what is being written can fail"
        again = "the same command with --resume goes on from the save before it"
        if error is None:
            return Failed(f"{self._writing.name} could not be written by another process of the run", hint=again)
        full = files.disk_is_full(error, self._folder.path)
        return Failed(
            f"{self._writing.name} could not be written: {first_line(error)}",
            hint=f"free some space; {again}" if full else again,
        )
