"""The generation configuration of a base's folder, read by transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig

from stackctl.core.errors import Incompatible, first_line


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """A base's generation configuration; None where it has none, or none that is JSON, as transformers takes it.

    Raises:
        Incompatible: it holds what no generation configuration can.
    """
    try:
        found = GenerationConfig.from_pretrained(folder, local_files_only=True)
        ends = found.eos_token_id
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends]) if end is not None):
            raise ValueError(f"eos_token_id is {ends!r}")
        return found
    except OSError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Incompatible(
            f"{folder / 'generation_config.json'} cannot be read ({first_line(error)[:200]})",
            hint="get generation_config.json again from where the model came",
        ) from error
