"""Adapters exported for other programs, made once and kept in the cache under the digest of what they are made of."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible
from stackctl.plan.stack_plan import StackPlan
from stackctl.storage.locks import locked_cache

_LAYOUT = 1
"""Another number where an export of the same stack would be other bytes."""


exported_adapters = functools.partial(locked_cache, "adapters", "the cache of exported adapters")
"""Adapters exported for an engine."""


def exported(plan: StackPlan, kind: str, write: Callable[[Path], Any]) -> Path:
    """The folder with a stack as one adapter of ``kind`` (``gguf``, ``peft``), which ``write`` makes if it is missing.

    Raises:
        Incompatible: a member of the stack is in no registry, so that nothing says what it is.
    """
    with exported_adapters() as folder:
        found = folder / f"{kind}-{_digest(plan)[:32]}"
        if found.is_dir():
            with contextlib.suppress(OSError):  # gc looks at when it was last used
                os.utime(found)
        else:
            write(found)
    return found


def _digest(plan: StackPlan) -> str:
    """What an export depends on: the base, the bytes of the members, their weights, the method and its options."""
    members = [(m.digest, m.weight, sorted(m.layer_weights.items())) for m in plan.members if m.is_used]
    if not all(digest for digest, _, _ in members):
        raise Incompatible("only registered adapters are exported into the cache", hint="stackctl add NAME FOLDER")
    base = plan.known_base
    said = (_LAYOUT, base.fingerprint, base.name, plan.method, repr(plan.options), members)
    return hashlib.sha256(repr(said).encode()).hexdigest()
