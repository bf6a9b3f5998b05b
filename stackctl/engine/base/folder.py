"""Where the files of a registered base are: found, fetched or converted again. No tensor library is loaded for it."""

from __future__ import annotations

from pathlib import Path

from stackctl.core import Say
from stackctl.core.schema import Base
from stackctl.registry.base_models import base_gguf, check_base_folder, converted_folder, converted_models
from stackctl.registry.store import Registry
from stackctl.storage import atomic, files


def base_folder(base: Base, registry: Registry, say: Say) -> Path:
    """The folder with a base's files, fetched or converted again if its cache is gone, checked by fingerprint.

    Raises:
        NotFound, VerificationFailed, HubFailure: it is gone, or is another model now.
    """
    if base.kind == "folder":
        folder = (registry.root / (base.path or base.source)).resolve()
    elif base.kind == "hub":
        folder, _ = registry.fetch_base(base.source, base.revision, say)
    else:
        gguf = base_gguf(base, registry.root)
        assert gguf is not None, "a base that is neither a folder nor from the Hub came from a GGUF file"
        folder = converted(gguf, say)
    return check_base_folder(folder, base)


def converted(gguf: Path, say: Say) -> Path:
    """The cached conversion of a GGUF file, made now if it is not there yet."""
    with converted_models() as bases:
        final = converted_folder(gguf)
        if (final / "config.json").is_file():
            return final
        from stackctl.engine.base.gguf_conversion import convert_gguf

        say(f"converting {gguf.name} once into the cache, in float32")
        with atomic.staging_directory(bases) as staged:
            convert_gguf(gguf, staged)
            if final.exists():
                files.remove_tree(final)
            atomic.publish_directory(staged, final)
    return final
