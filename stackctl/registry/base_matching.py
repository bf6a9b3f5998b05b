"""Which registered base an adapter belongs to, by what its files say of it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, NotFound, StackctlError
from stackctl.core.schema import AdapterInfo, AdapterVersion, Base, Stack
from stackctl.registry.adapters import find_digest
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_models import base_gguf, converted_folder, fingerprint
from stackctl.registry.store import Registry


@dataclass(frozen=True)
class StatedBase:
    """The base of an adapter, as the files beside it state it; what they do not say is empty.

    ``called`` is a Hub id or a folder, ``name`` what the base is called where the adapter comes from.
    """

    called: str
    name: str
    fingerprint: str

    @staticmethod
    def of(
        config: dict[str, Any],
        info: AdapterInfo | None,
        entry: AdapterVersion | None = None,
        recipe: Stack | None = None,
    ) -> StatedBase:
        """Out of its configuration, its ``adapter_info.json``, its entry and the stack that it came with."""
        named = config.get("base_model_name_or_path")
        called = (named if isinstance(named, str) else "") or (info.base_hub_id if info else None) or ""
        own = entry.fingerprint if entry else recipe.fingerprint if recipe else info.base_fingerprint if info else ""
        name = info.base if info else recipe.base if recipe else entry.base if entry else _short(called)
        return StatedBase(called, name, own)


def recognise_base(registry: Registry, stated: StatedBase) -> Base | None:
    """The registered base that is stated: by its fingerprint where that is known, else by what it is called.

    Of several that are the same model, the default one.
    """
    default = registry.settings().defaults.base
    bases = sorted(registry.bases(), key=lambda base: base.name != default)
    if not stated.fingerprint and (known := next((b for b in bases if is_called(b, stated.called, registry)), None)):
        return known
    own = stated.fingerprint or _fingerprint_in(stated.called)
    return next((base for base in bases if own and base.fingerprint == own), None)


def choose_base(registry: Registry, stated: StatedBase, digest: Callable[[], str | None]) -> tuple[Base, str]:
    """The base of an adapter that somebody registers without saying which, and what it is called if that is not here.

    That is the one that it was made on, where its files say which. A base in a folder may be that model under another
    name: where it is the only one here it is taken, and to be said. No other one is.

    Args:
        digest: of the adapter; it is asked for where it may have been registered already, on a base that was said.

    Raises:
        NotFound: the one that is stated is not here; the hint is how to register it.
        Incompatible: another model has its name.
    """
    if known := recognise_base(registry, stated):
        return known, ""
    bases, named = list(registry.bases()), stated.called or stated.name
    if not named and not stated.fingerprint:
        return resolve_base(registry), ""
    if not stated.fingerprint and (same := next((base for base in bases if base.name == named), None)):
        return same, ""
    if (own := digest()) and (found := find_digest(registry, own)):
        return resolve_base(registry, found.version.base), named
    # Somebody else's words, in a line that people paste into a shell.
    offer = shlex.join(["stackctl", "base", "add", stated.name or "NAME", stated.called or "SOURCE"])
    if stated.fingerprint:
        same = next((b for b in bases if b.name == stated.name or is_called(b, stated.called, registry)), None)
        if same:
            raise Incompatible(
                f"it was trained on another model than the base '{same.name}' is here (fingerprints differ)",
                hint=f"register that model under another name ({offer}), or insist: --base {same.name}",
            )
    elif len(bases) == 1 and bases[0].hub_id is None:
        return bases[0], named
    hint = f"register it: {offer}, or say which it is: --base NAME" if bases else offer
    raise NotFound(f"its base is '{named}', which is not registered", hint=hint)


def is_called(base: Base, name: str, registry: Registry) -> bool:
    """Whether a name in somebody's configuration means this base: its Hub id, its source, or its folder."""
    return bool(name) and (name in (base.hub_id, base.source) or _is_its_folder(base, name, registry))


def _is_its_folder(base: Base, name: str, registry: Registry) -> bool:
    try:
        folder = Path(name).resolve()
        if base.path:
            return folder == (registry.root / base.path).resolve()
        if folder.parent.name != "bases":  # where the cache keeps what was converted; else nothing need be hashed
            return False
        gguf = base_gguf(base, registry.root)
    except (ValueError, RuntimeError, NotFound):  # NUL, half a character, links in a circle; a file that is gone
        return False
    return gguf is not None and folder == converted_folder(gguf).resolve()


def _fingerprint_in(name: str) -> str:
    """Of the model in the folder of that name, which may be a copy of a base; empty where there is none."""
    try:
        return fingerprint(Path(name)) if name and (Path(name) / "config.json").is_file() else ""
    except (ValueError, OSError, StackctlError):
        return ""


def _short(called: str) -> str:
    """A base's name here, made from its name on the Hub."""
    last = called.rstrip("/").rpartition("/")[2].lower()
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in last)[:64].strip("-._")
