"""Which registered base a checkpoint belongs to, by what it says of itself."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stackctl.core import Say
from stackctl.core.errors import Incompatible, NotFound, StackctlError
from stackctl.core.schema import AdapterInfo, AdapterVersion, Base, Stack
from stackctl.lora.checkpoint import Checkpoint
from stackctl.registry.adapters import find_digest
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.base_models import base_gguf, converted_folder, fingerprint
from stackctl.registry.store import Registry


def named_base(config: dict[str, Any]) -> str:
    """What a checkpoint's configuration calls its base: a Hub id, a folder, or nothing."""
    name = config.get("base_model_name_or_path")
    return name if isinstance(name, str) else ""


def is_called(base: Base, name: str, registry: Registry) -> bool:
    """Whether a name in somebody's configuration means this base: its Hub id, its source, or its folder."""
    return bool(name) and (name in (base.hub_id, base.source) or _is_its_folder(base, name, registry))


def recognise_base(registry: Registry, config: dict[str, Any], info: AdapterInfo | None) -> Base | None:
    """The registered base that a checkpoint was made on: by its fingerprint where it notes one, else by its name.

    Of several that are the same model, the default one.
    """
    default = registry.settings().defaults.base
    bases = sorted(registry.bases(), key=lambda base: base.name != default)
    if info and info.base_fingerprint:
        return next((base for base in bases if base.fingerprint == info.base_fingerprint), None)
    name = named_base(config)
    return next((base for base in bases if is_called(base, name, registry)), None) or _same_model(bases, name)


def _same_model(bases: list[Base], name: str) -> Base | None:
    """The base that is the model in the folder of that name: a copy in another place."""
    try:
        if not name or not (Path(name) / "config.json").is_file():
            return None
        own = fingerprint(Path(name))
    except (ValueError, OSError, StackctlError):
        return None
    return next((base for base in bases if base.fingerprint == own), None)


def choose_base(registry: Registry, checkpoint: Checkpoint, info: AdapterInfo | None) -> tuple[Base, str]:
    """The base of a checkpoint that somebody registers without saying which, and what it calls it if that is not here.

    That is the one that it was made on, where it says which. A base in a folder may be that model under another name:
    where it is the only one here it is taken, and to be said. No other one is.

    Raises:
        NotFound: the one that it names is not here.
    """
    if known := recognise_base(registry, checkpoint.config, info):
        return known, ""
    name = named_base(checkpoint.config) or (info.base_hub_id or info.base if info else "")
    bases = list(registry.bases())
    if not name or not bases:
        return resolve_base(registry), ""
    if called := next((base for base in bases if base.name == name), None):
        return called, ""
    if same := find_digest(registry, checkpoint.digest()):  # it was registered here already, on a base that was said
        return resolve_base(registry, same.version.base), name
    if len(bases) == 1 and bases[0].hub_id is None:
        return bases[0], name
    offer = shlex.join(["stackctl", "base", "add", info.base if info else "NAME", name])
    raise NotFound(
        f"its base is '{name}', which is not registered", hint=f"register it: {offer}, or say which it is: --base NAME"
    )


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


@dataclass(frozen=True)
class StatedBase:
    """The base of an adapter from elsewhere, as the files beside it state it; what they do not say is empty."""

    name: str
    hub_id: str
    fingerprint: str

    @staticmethod
    def of(
        config: dict[str, Any], entry: AdapterVersion | None, info: AdapterInfo | None, recipe: Stack | None
    ) -> StatedBase:
        """Out of its configuration, its entry, its ``adapter_info.json`` and the stack that it came with."""
        hub_id = named_base(config) or (info.base_hub_id if info else None) or ""
        own = entry.fingerprint if entry else recipe.fingerprint if recipe else info.base_fingerprint if info else ""
        name = info.base if info else recipe.base if recipe else entry.base if entry else _short(hub_id)
        return StatedBase(name, hub_id, own)


def find_stated_base(registry: Registry, stated: StatedBase, say: Say) -> Base:
    """The base that an adapter was trained on: by its fingerprint, else by its name on the Hub.

    Raises:
        NotFound: it is not registered here; the hint is how to register it.
        Incompatible: another model has its name.
    """
    bases, name, hub_id = list(registry.bases()), stated.name, stated.hub_id
    # Somebody else's words, in a line that people paste into a shell.
    offer = shlex.join(["stackctl", "base", "add", name or "NAME", hub_id or "SOURCE"])
    if stated.fingerprint:
        for base in bases:
            if base.fingerprint == stated.fingerprint:
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
