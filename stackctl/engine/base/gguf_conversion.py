"""A GGUF file as an ordinary model folder, in float32, with tokenizer and chat template."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from stackctl.core.errors import Incompatible, first_line
from stackctl.engine.base.gguf_facts import complete, take_sizes, take_splits
from stackctl.engine.base.tokenizer import keep_reader, load_reader
from stackctl.engine.libraries import replaced

_UNREADABLE = (ValueError, KeyError, OSError, RuntimeError, IndexError)


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write the folder ``out``, which is there.

    Raises:
        Incompatible: transformers cannot read the file, or not all of it.
    """
    hf_logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True, "trust_remote_code": False}
    try:
        with reading_once(), contextlib.redirect_stderr(io.StringIO()):  # its bar cannot be switched off
            config = AutoConfig.from_pretrained(str(gguf.parent), **source)
            take_sizes(config, gguf)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), config=config, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True, **source,
            )  # fmt: skip
            model, loading = loaded
            unread = list(complete(model, loading, gguf))
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **source)
            unread += take_splits(tokenizer, gguf)
    except Exception as error:
        if not isinstance(error, _UNREADABLE) and type(error) is not Exception:  # as which tokenizers raises its own
            raise
        raise Incompatible(
            f"{gguf} cannot be read as a causal language model ({first_line(error)[:200]})",
            hint="give the model as a folder or a Hub id instead",
        ) from error
    if unread:
        raise Incompatible(
            f"{gguf} is not all that transformers makes of it: {'; '.join(unread)}",
            hint="give the model as a folder or a Hub id instead",
        )
    # A model that came from GGUF refuses to be saved while it claims to be quantised; its weights no longer are.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None  # type: ignore[assignment]  # transformers itself keeps it so
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    keep_reader(out, load_reader(out))


@contextlib.contextmanager
def reading_once() -> Iterator[None]:
    """While the body runs, a header is parsed once, and the names of an architecture's tensors are listed once.

    transformers (5.23) has the header parsed for the configuration, the weights and the tokenizer, where each word of
    the vocabulary costs gguf four views of an array; and the names listed for every module of the model. The views are
    of a plain array over the mapped file: of ``numpy.memmap`` each would be made, and each byte read, in Python.
    """
    import gguf

    reader, memmap = gguf.GGUFReader, np.memmap

    @functools.cache
    def read(file: str) -> gguf.GGUFReader:
        with replaced(np, "memmap", lambda *given, **options: np.asarray(memmap(*given, **options))):
            return reader(file)

    names = functools.cache(gguf.get_tensor_name_map)
    with replaced(gguf, "GGUFReader", read), replaced(gguf, "get_tensor_name_map", names):
        yield
