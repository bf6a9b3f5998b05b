"""The only reader and writer of ``registry/``.

One small file per thing, so that a name resolves by reading one file and a change is one atomic replace. Weights
are put in place first, the entry is written last: what has no entry does not exist.

What is named here is imported when it is asked for: a command that only lists entries needs no more than these.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stackctl.registry.entries import Entries, find_registry, init_registry, now
    from stackctl.registry.index import Rows
    from stackctl.registry.removing import Freed
    from stackctl.registry.resolving import ResolvedMember, ResolvedStack, resolve_all
    from stackctl.registry.summaries import AdapterRow, VersionRow, version_row
    from stackctl.registry.verifying import Registry

__all__ = [
    "AdapterRow",
    "Entries",
    "Freed",
    "Registry",
    "ResolvedMember",
    "ResolvedStack",
    "Rows",
    "VersionRow",
    "find_registry",
    "init_registry",
    "now",
    "resolve_all",
    "version_row",
]

_MODULES = {
    "entries": ("Entries", "find_registry", "init_registry", "now"),
    "index": ("Rows",),
    "removing": ("Freed",),
    "resolving": ("ResolvedMember", "ResolvedStack", "resolve_all"),
    "summaries": ("AdapterRow", "VersionRow", "version_row"),
    "verifying": ("Registry",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"stackctl.registry.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
