"""Which registered base a checkpoint belongs to, by what it says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stackctl.core.errors import NotFound
from stackctl.core.schema import AdapterInfo, Base
from stackctl.registry.base_models import base_gguf, converted_folder
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
    return next((base for base in bases if is_called(base, named_base(config), registry)), None)


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
