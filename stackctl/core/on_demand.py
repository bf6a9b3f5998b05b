"""What a package offers, brought from its modules when it is asked for: not all who need one part can wait for others.

https://peps.python.org/pep-0562/
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any


def on_demand(package: str, **names: Iterable[str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package: under each of its modules' names, what is brought from there."""
    homes = {name: module for module, found in names.items() for name in found}

    def bring(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return bring
