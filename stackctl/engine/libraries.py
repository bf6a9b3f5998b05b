"""Other people's libraries: what they say is kept quiet, and what leaves no other way is replaced for a while."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any


def quiet_libraries() -> None:
    """Keep other people's bars and advice off stderr; ours says what matters."""
    from transformers.utils import logging as hf_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if hf_logging.get_verbosity() != logging.ERROR:  # setting it makes every logger forget what it knows
        hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(peft|transformers|torch|accelerate)(\.|$)")


@contextlib.contextmanager
def off_stdout() -> Iterator[None]:
    """What is printed in the body goes to stderr, by code that is not Python, too: stdout has the command's results."""
    shown = sys.stdout
    shown.flush()
    before = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        shown.flush()
        os.dup2(before, 1)
        os.close(before)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An object's attribute is another one while the body runs; one that its class has is only hidden."""
    own = vars(owner)
    had, before = name in own, own.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
