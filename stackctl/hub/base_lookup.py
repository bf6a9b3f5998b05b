"""Which base of this registry an adapter from the Hub belongs to."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from stackctl.core.errors import Incompatible, NotFound
from stackctl.core.schema import AdapterInfo, AdapterVersion, Base, Stack
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_matching import is_called, named_base
from stackctl.registry.store import Registry


def find_base(
    registry: Registry,
    config: dict[str, Any],
    entry: AdapterVersion | None,
    info: AdapterInfo | None,
    recipe: Stack | None,
    asked: str | None,
    say: Callable[[str], None],
) -> Base:
    """The base that an adapter was trained on: asked for, else by its fingerprint, else by its name on the Hub.

    Raises:
        NotFound: it is not registered here; the hint is how to register it.
        Incompatible: another model has its name.
    """
    if asked is not None:
        return resolve_base(registry, asked)
    bases = list(registry.bases())
    hub_id = named_base(config) or (info.base_hub_id if info else None) or ""
    fingerprint = (
        entry.fingerprint if entry else recipe.fingerprint if recipe else info.base_fingerprint if info else ""
    )
    name = info.base if info else recipe.base if recipe else entry.base if entry else _short(hub_id)
    # Somebody else's words, in a line that people paste into a shell.
    offer = shlex.join(["stackctl", "base", "add", name or "NAME", hub_id or "SOURCE"])
    if fingerprint:
        for base in bases:
            if base.fingerprint == fingerprint:
                return base
        same = next((b for b in bases if b.name == name or (hub_id and b.hub_id == hub_id)), None)
        if same:
            raise Incompatible(
                f"it was trained on another model than the base '{same.name}' is here (fingerprints differ)",
                hint=f"register that model under another name ({offer}), or insist: --base {same.name}",
            )
        raise NotFound(f"its base '{name}' ({hub_id}) is not registered here", hint=offer)
    for base in bases:
        if is_called(base, hub_id, registry):
            return base
    unnamed = [base for base in bases if base.hub_id is None]
    if not unnamed:
        raise NotFound(f"its base '{hub_id}' is not registered here", hint=offer)
    base = resolve_base(registry)
    if base.hub_id is not None:
        raise NotFound(f"its base '{hub_id}' is not registered here", hint=f"{offer}, or say which it is: --base NAME")
    say(f"note: it says that its base is '{hub_id}'; it is registered on '{base.name}' (--base chooses another)")
    return base


def _short(hub_id: str) -> str:
    """A base's name here, made from its name on the Hub."""
    last = hub_id.rstrip("/").rpartition("/")[2].lower()
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last)[:64].strip("-._")
