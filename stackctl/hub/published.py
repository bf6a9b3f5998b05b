"""An adapter's own files as they go up to the Hub: nothing in them leads to a place on this disk. Nothing is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import msgspec

from stackctl.core.errors import StackctlError
from stackctl.core.hub_ids import parse_dataset_id
from stackctl.core.provenance import DataSource
from stackctl.core.schema import Adapter, AdapterInfo, Base, CheckpointMember
from stackctl.hub.repos import Content
from stackctl.lora.checkpoint import CONFIG, INFO, TEMPLATE_FILE, WEIGHTS, read_config, read_info
from stackctl.registry.adapters import ResolvedMember, foundations, resolve_adapter
from stackctl.registry.base_models import TOKENIZER
from stackctl.registry.checkpoint_files import check_links, stays_inside
from stackctl.registry.store import Registry
from stackctl.render.loss_curve import LOG
from stackctl.storage.files import read_json
from stackctl.storage.yaml_text import format_yaml

ADAPTER_FILE = "adapter.yaml"
MEMBERS = "members"
"""The folder with those members of a stack that lie in it by themselves."""
TOKENIZER_CONFIG = "tokenizer_config.json"
_CHAT_TEMPLATES = {TEMPLATE_FILE, "chat_template.json"}
TOKENIZER_FILES = (*TOKENIZER, *sorted(_CHAT_TEMPLATES))
CHECKPOINT = (CONFIG, WEIGHTS, INFO, LOG, *TOKENIZER_FILES)
"""The files of a checkpoint that travel. Nothing else does, in either direction: what is not here is not fetched."""


def checkpoint_files(
    registry: Registry, member: ResolvedMember, base: Base, base_id: str, here: Mapping[str, str] | None = None
) -> dict[str, Content]:
    """A member's own files as they go up: nothing in them leads to a place on this disk.

    Args:
        here: labels of the adapters that go up together with it, to their repo.
    """
    folder = registry.weights_path(member.version)
    check_links(folder)
    content: dict[str, Content] = {
        name: path for name in CHECKPOINT if (path := folder / name).is_file() and stays_inside(path)
    }
    content[CONFIG] = published_config(folder, base_id)
    if TOKENIZER_CONFIG in content:
        content[TOKENIZER_CONFIG] = published_tokenizer_config(folder / TOKENIZER_CONFIG)
    content[INFO] = _json(msgspec.to_builtins(published_info(registry, member, base, base_id, here or {})))
    entry = Adapter(
        name=member.adapter.name, description=member.adapter.description,
        versions=[msgspec.structs.replace(published_entry(member), base=own_base_name(folder, base))],
    )  # fmt: skip
    content[ADAPTER_FILE] = format_yaml(msgspec.to_builtins(entry)).encode()
    return content


def published_config(folder: Path, base_id: str) -> bytes:
    return _json({**read_config(folder), "base_model_name_or_path": base_id}, sort_keys=True)


def published_tokenizer_config(path: Path) -> Content:
    """``name_or_path`` is where the tokenizer was loaded from, which may be a folder here."""
    config = read_json(path)
    places = [key for key in ("name_or_path", "tokenizer_file", "vocab_file") if _is_local(config.get(key))]
    if not places:
        return path
    return _json({key: value for key, value in config.items() if key not in places})


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and (PurePath(value).is_absolute() or "\\" in value or value.startswith((".", "~")))


def _json(value: Any, *, sort_keys: bool = False) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=sort_keys) + "\n").encode()


def published_entry(member: ResolvedMember) -> Any:
    """A version's entry without what is true of this registry only."""
    version = member.version
    return msgspec.structs.replace(version, path=".", hub=None, pushed=None, data=_published_data(version.data))


def _published_data(data: DataSource | None) -> DataSource | None:
    if data is None or parse_dataset_id(data.path):
        return data
    inside = not _is_local(data.path) and ".." not in PurePath(data.path).parts
    return data if inside else msgspec.structs.replace(data, path=PurePath(data.path).name)


def own_base_name(folder: Path, base: Base) -> str:
    """What the base was called where the adapter was made: the name on this disk may be another."""
    info = read_info(folder)
    return info.base if info else base.name


def published_info(
    registry: Registry, member: ResolvedMember, base: Base, base_id: str, here: Mapping[str, str]
) -> AdapterInfo:
    folder = registry.weights_path(member.version)
    info = read_info(folder)
    label = "+".join([*member.version.trained_on, member.label])
    return AdapterInfo(
        adapter=member.adapter.name,
        version=member.version.version,
        base=info.base if info else base.name,
        base_fingerprint=member.version.fingerprint,
        base_hub_id=base_id,
        trained_on=list(_foundations(registry, member, info, here)),
        chat_template=next((name for name in sorted(_CHAT_TEMPLATES) if (folder / name).is_file()), None),
        usage=info.usage if info and info.usage else f"stackctl generate {label}",
        created_by=info.created_by if info else "",
    )


def _foundations(
    registry: Registry, member: ResolvedMember, info: AdapterInfo | None, here: Mapping[str, str]
) -> Iterator[CheckpointMember]:
    """What a member was trained on, with digests and, where it is known, the repo that holds it."""
    told = {m.label: m for m in info.trained_on} if info else {}
    for term in foundations(member.version):
        label, name, number = str(term.reference), term.reference.name, term.reference.version or 1
        known = told.get(label)
        digest, repo = (known.digest, known.repo) if known else ("", None)
        try:
            version = resolve_adapter(registry, term.reference).version
        except StackctlError:
            version = None
        if version is not None:
            place = version.pushed or version.hub
            digest, repo = version.digest, repo or (place.repo if place else None)
        repo = here.get(label, repo)
        yield CheckpointMember(adapter=name, version=number, digest=digest, weight=term.weight, repo=repo)
