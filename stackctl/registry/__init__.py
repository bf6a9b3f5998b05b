"""The only reader and writer of ``registry/``.

One small file per thing, so that a name resolves by reading one file and a change is one atomic replace. Weights
are put in place first, the entry is written last: what has no entry does not exist.
"""

from stackctl.registry.entries import find_registry, init_registry, now
from stackctl.registry.index import Rows
from stackctl.registry.removing import Freed
from stackctl.registry.resolving import ResolvedMember, ResolvedStack, resolve_all
from stackctl.registry.rows import AdapterRow, VersionRow, version_row
from stackctl.registry.verifying import Registry

__all__ = [
    "AdapterRow",
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
