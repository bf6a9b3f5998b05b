"""The saves of an unfinished run: all ranks begin one, write it and end it together, and only then is it removed.

A rank that writes does not wait for the others, so that none may begin before the folder is there, and none may remove
the folder, or call it whole, before all have agreed that they are done with it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stackctl.core.errors import Failed, first_line
from stackctl.engine.training.distributed import keeps_parts, told_by_each, wait
from stackctl.jobs import ranks
from stackctl.registry.run_folders import RunFolder
from stackctl.storage import files

WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What writing raises: torch and safetensors wrap what the system said."""


class RunSaves(TrainerCallback):
    """Where Trainer's saves lie, and which one is being written; a save is one when :meth:`on_save` has ended."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        self._writing: Path | None = None

    def begin(self, save: Path) -> None:
        """Make a save's folder. Each rank may write into it afterwards.

        Raises:
            Failed: it cannot be made.
        """
        self._writing = save
        self._on_first_rank(lambda: save.mkdir(parents=True, exist_ok=True))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """All of a save was written by this rank."""
        self._agree(None)
        self._on_first_rank(lambda: self._folder.finish(self._folder.save_at(state.global_step)))
        self._writing = None

    def _on_first_rank(self, work: Callable[[], object]) -> None:
        """Do something on rank 0 alone, and agree on how it went."""
        error = None
        if ranks.rank() == 0:
            try:
                work()
            except OSError as reason:
                error = reason
        self._agree(error)

    def fail(self, error: Exception) -> None:
        """Turn what was raised while a save was written into an error of all ranks; at any other time do nothing.

        Raises:
            Failed: the save could not be written.
        """
        if self._writing is None:
            return
        if keeps_parts():  # the others are on the way to an exchange inside of it, and cannot be asked
            raise self._failed(self._writing, *self._reason(error)) from error
        self._agree(error)

    def _agree(self, error: Exception | None) -> None:
        """Go on when all ranks are here; if one of them failed, rank 0 removes the save and all raise what that said.

        Raises:
            Failed: a rank could not write.
        """
        save, self._writing = self._writing, None  # what the exchange itself raises is no failure to write
        reasons = told_by_each(self._reason(error) if error else None)
        if save is None or not reasons:
            self._writing = save
            return
        if ranks.rank() == 0:
            files.remove_tree(save)
        wait()  # the first that raises ends all
        raise self._failed(save, *reasons[0]) from error

    def _reason(self, error: Exception) -> tuple[str, bool]:
        """What went wrong, and whether that is a full disk."""
        return first_line(error), files.disk_is_full(error, self._folder.path)

    @staticmethod
    def _failed(save: Path, reason: str, full: bool) -> Failed:
        again = "the same command with --resume goes on from the save before it"
        return Failed(
            f"{save.name} could not be written: {reason}", hint=f"free some space; {again}" if full else again
        )
