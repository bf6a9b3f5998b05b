"""A GGUF file as an ordinary model folder, in float32, with tokenizer and chat template."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.base_reader import keep_reader, load_reader


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the folder ``out``, which is there.

    Raises:
        Incompatible: transformers cannot read the file.
    """
    hf_logging.disable_progress_bar()
    try:
        with _read_once(), contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            model = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True,
                trust_remote_code=False,
            )  # fmt: skip
            tokenizer = AutoTokenizer.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, local_files_only=True, trust_remote_code=False
            )
    except (ValueError, KeyError, OSError, RuntimeError, IndexError) as error:
        raise Incompatible(
            f"{gguf} cannot be read as a causal language model ({first_line(error)[:200]})",
            hint="give the model as a folder or a Hub id instead",
        ) from error
    # A model that came from GGUF refuses to be saved while it claims to be quantised; its weights no longer are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]  # transformers itself keeps it so
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    keep_reader(out, load_reader(out))


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """While the body runs, a header is parsed once: transformers (5.23) has it parsed for the configuration, the
    weights and the tokenizer, and each word of the vocabulary costs gguf four views of an array.
    """
    import gguf

    reader = gguf.GGUFReader
    setattr(gguf, "GGUFReader", functools.cache(reader))  # noqa: B010  # a function in place of a class
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", reader)  # noqa: B010
