"""A base from a GGUF file, ready to answer in llama.cpp: its prompts without transformers where that can be."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stackctl.core import Say
from stackctl.core.schema import Base
from stackctl.engine import imports_are_done
from stackctl.engine.base.folder import base_folder
from stackctl.engine.base.tokenizer import BaseReader, keep_reader, kept_reader, load_reader
from stackctl.engine.generation.reader import PlainReader
from stackctl.engine.llama_cpp.engine import LlamaCpp
from stackctl.engine.llama_cpp.server import Settings
from stackctl.machine.resources import main_memory
from stackctl.registry.base_models import base_gguf, no_gguf
from stackctl.registry.store import Registry

_SLOTS = 4
_SHARE = 4
"""The cache of keys and values takes at most one part in so many of the memory that is free."""
_LEAST_CONTEXT = 512
_LEAST_TOKEN = 1024
"""Bytes that a token takes where nothing is known of it."""


def load_llama_cpp(base: Base, registry: Registry, *, device: str = "auto", say: Say = lambda _: None) -> LlamaCpp:
    """A base that came from a GGUF file, in llama.cpp, which starts with the first stack.

    Raises:
        Incompatible: it did not.
        NotFound, VerificationFailed: its file is gone, or another one now.
    """
    gguf = base_gguf(base, registry.root)
    if gguf is None:
        raise no_gguf(base)
    folder = base_folder(base, registry, say)
    found = kept_reader(folder) or _read(folder)
    imports_are_done()
    exact = gguf.stat().st_size >= 4 * base.parameters  # every weight is a number of four bytes
    context = _context(base, found.cached_numbers * (4 if exact else 2))
    known = msgspec.structs.replace(base, context_length=context)
    reader = PlainReader(known, found.tokenizer, found.generation_config)
    return LlamaCpp(reader, folder, Settings(gguf, context, _SLOTS, device, exact), say)


def _read(folder: Path) -> BaseReader:
    """What prompts need of a base by transformers, kept for the next time where that can be."""
    from stackctl.engine.quick_imports import import_transformers

    import_transformers()
    reader = load_reader(folder)
    keep_reader(folder, reader)
    return reader


def _context(base: Base, token: int) -> int:
    """How many tokens all answers at once may have, each of which keeps so many bytes: as many as the base reads, or as
    the memory has room for."""
    room = max(main_memory().available // _SHARE // max(token, _LEAST_TOKEN), _LEAST_CONTEXT)
    return min(base.context_length or room, room)
