"""Reading a base's small files by transformers, which raises whatever odd contents come to in its code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig

from stackctl.core.errors import Incompatible, first_line

ODD = (ValueError, LookupError, TypeError, AttributeError, AssertionError, StrictDataclassError)
"""What transformers raises of a value that is not of the type, or not in the range, that it expects."""
_GENERATION = "generation_config.json"


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """A base's generation configuration; None where it has none, or none that is JSON, as transformers takes it.

    Raises:
        Incompatible: it holds what no generation configuration can.
    """
    with contextlib.suppress(OSError), _of(folder / _GENERATION):
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        ends = found.eos_token_id
        if not all(
            isinstance(token, int) for token in (ends if isinstance(ends, list) else [ends]) if token is not None
        ):
            raise ValueError(f"eos_token_id is {ends!r}")
        return found
    return None


@contextlib.contextmanager
def _of(file: Path) -> Iterator[None]:
    try:
        yield
    except ODD as error:
        raise Incompatible(
            f"{file} cannot be read ({first_line(error)[:200]})",
            hint=f"get {file.name} again from where the model came",
        ) from error
