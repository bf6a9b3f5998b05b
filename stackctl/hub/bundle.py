"""What goes up to the Hub for an adapter or a stack: every file, made from the registry. Nothing is sent here.

The same entries give the same bytes, wherever the registry lies: that is how a push finds out that nothing changed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import msgspec

from stackctl.core.command_line import CommandLine
from stackctl.core.errors import Incompatible, StackctlError, Usage
from stackctl.core.expressions import Reference, parse_expression
from stackctl.core.hub_ids import is_hub_id, parse_dataset_id
from stackctl.core.schema import Adapter, AdapterInfo, Base, CheckpointMember, DataSource, Stack
from stackctl.hub.card import CARD, Card, CardFacts, CardMember, TrainedOn, render_card
from stackctl.hub.remote_files import Content
from stackctl.lora.checkpoint import CONFIG, INFO, WEIGHTS, read_checkpoint, read_config, read_info
from stackctl.registry.adapters import ResolvedMember, resolve_adapter
from stackctl.registry.base_models import TOKENIZER, read_json
from stackctl.registry.checkpoint_files import check_digests, check_links, stays_inside
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry
from stackctl.render.loss_curve import LOG, PICTURE, read_curve, render_curve_svg
from stackctl.storage.yaml_text import format_yaml

STACK = "stack.yaml"
ADAPTER = "adapter.yaml"
MEMBERS = "members"

_CHAT_TEMPLATES = {"chat_template.jinja", "chat_template.json"}
_TOKENIZER = (*TOKENIZER, *sorted(_CHAT_TEMPLATES))
CHECKPOINT = (CONFIG, WEIGHTS, INFO, LOG, *_TOKENIZER)
"""The files of a checkpoint that travel. Nothing else does, in either direction: what is not here is not fetched."""


@dataclass(frozen=True)
class BundleOptions:
    """What a person says about a push that the registry does not know."""

    base_id: str | None = None
    facts: CardFacts = field(default_factory=CardFacts)
    members: bool = False


@dataclass(frozen=True)
class Destination:
    """Where files go up to, the base's id on the Hub, and what the card says besides."""

    repo: str
    base_id: str
    facts: CardFacts = field(default_factory=CardFacts)


def is_ours(path: str) -> bool:
    """Whether a file of a repo is one that a push writes, and so may remove when it is no longer wanted."""
    if path.startswith(f"{MEMBERS}/"):
        return path.count("/") == 2
    return path in {*CHECKPOINT, STACK, ADAPTER, PICTURE}


def resolve_base_id(registry: Registry, stack: ResolvedStack, asked: str | None, again: CommandLine) -> str:
    """The Hub id of a stack's base.

    Raises:
        Usage: nobody knows it, or what was asked for is no Hub id.
    """
    if asked is not None:
        if not is_hub_id(asked) or Path(asked).exists():
            raise Usage(f"--base-id '{asked}' is not a Hub id", hint="write owner/name, as on the model's page")
        return asked
    base = stack.base
    if base.hub_id:
        return base.hub_id
    if base.kind == "hub":
        return base.source
    for member in stack.members:
        folder = registry.weights_path(member.version)
        known = (read_info(folder) or AdapterInfo(adapter="", version=1, base="", base_fingerprint="")).base_hub_id
        if known is None and member.version.hub is not None:  # it came from the Hub, so what it says was true there
            known = read_config(folder).get("base_model_name_or_path")
        if isinstance(known, str) and is_hub_id(known):
            return known
    raise Usage(
        f"the base '{base.name}' is not from the Hub, so others could not load what you push",
        hint=f"say which model on the Hub it is: {again.having('--base-id', 'OWNER/NAME')}",
    )


# -- an adapter -----------------------------------------------------------------------------------------------------


def bundle_adapter(registry: Registry, member: ResolvedMember, base: Base, to: Destination) -> dict[str, Content]:
    """The files of one adapter: its checkpoint at the root, its entry, its card."""
    content = checkpoint_files(registry, member, base, to.base_id)
    curve = _picture([(member, registry.weights_path(member.version))])
    info = _published_info(registry, member, base, to.base_id, {})
    card = Card(
        name=member.adapter.name,
        repo=to.repo,
        base_id=to.base_id,
        members=(CardMember(member.adapter.name, _published(member), description=member.adapter.description),),
        rank=max(member.version.lora.r, *member.version.lora.rank_pattern.values(), 0),
        foundations=tuple(TrainedOn(m.adapter, m.version, m.weight, m.digest, m.repo) for m in info.trained_on),
        facts=to.facts,
        has_picture=curve is not None,
        has_tokenizer=_has_tokenizer(content),
    )
    return {**content, **_picture_file(curve), CARD: render_card(card).encode()}


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
    content[CONFIG] = _published_config(folder, base_id)
    if "tokenizer_config.json" in content:
        content["tokenizer_config.json"] = _published_tokenizer_config(folder / "tokenizer_config.json")
    content[INFO] = _json(msgspec.to_builtins(_published_info(registry, member, base, base_id, here or {})))
    entry = Adapter(
        name=member.adapter.name, description=member.adapter.description,
        versions=[msgspec.structs.replace(_published(member), base=_base_name(folder, base))],
    )  # fmt: skip
    content[ADAPTER] = format_yaml(msgspec.to_builtins(entry)).encode()
    return content


def _published_config(folder: Path, base_id: str) -> bytes:
    return _json({**read_config(folder), "base_model_name_or_path": base_id}, sort_keys=True)


def _published_tokenizer_config(path: Path) -> Content:
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


def _published(member: ResolvedMember) -> Any:
    """A version's entry without what is true of this registry only."""
    version = member.version
    return msgspec.structs.replace(version, path=".", hub=None, pushed=None, data=_published_data(version.data))


def _published_data(data: DataSource | None) -> DataSource | None:
    if data is None or parse_dataset_id(data.path):
        return data
    inside = not _is_local(data.path) and ".." not in PurePath(data.path).parts
    return data if inside else msgspec.structs.replace(data, path=PurePath(data.path).name)


def _base_name(folder: Path, base: Base) -> str:
    """What the base was called where the adapter was made: the name on this disk may be another."""
    info = read_info(folder)
    return info.base if info else base.name


def _published_info(
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
    told = {(m.adapter, m.version): m for m in info.trained_on} if info else {}
    for term in parse_expression("+".join(member.version.trained_on)) if member.version.trained_on else ():
        name, number = term.reference.name, term.reference.version or 1
        known = told.get((name, number))
        digest, repo = (known.digest, known.repo) if known else ("", None)
        try:
            version = resolve_adapter(registry, Reference(name, number)).version
        except StackctlError:
            version = None
        if version is not None:
            place = version.pushed or version.hub
            digest, repo = version.digest, repo or (place.repo if place else None)
        repo = here.get(f"{name}@{number}", repo)
        yield CheckpointMember(adapter=name, version=number, digest=digest, weight=term.weight, repo=repo)


# -- a stack --------------------------------------------------------------------------------------------------------


def bundle_stack(
    registry: Registry, stack: ResolvedStack, name: str, to: Destination, exported: Path, *, members: bool
) -> dict[str, Content]:
    """The files of a stack: the one adapter that is its sum, the recipe, the card, and its members if asked for.

    Args:
        exported: the folder with the stack as one PEFT adapter; it must last until the push is over.
    """
    content: dict[str, Content] = {
        WEIGHTS: exported / WEIGHTS,
        CONFIG: _published_config(exported, to.base_id),
    }
    newest = max(stack.members, key=lambda m: (_tokenizer_rank(registry, m), m.version.created))
    source = registry.weights_path(newest.version)
    content |= {file: path for file in _TOKENIZER if (path := source / file).is_file() and stays_inside(path)}
    if "tokenizer_config.json" in content:
        content["tokenizer_config.json"] = _published_tokenizer_config(source / "tokenizer_config.json")
    content[STACK] = format_yaml(_recipe(registry, stack, name)).encode()
    if members:
        for member in stack.members:
            own = checkpoint_files(registry, member, stack.base, to.base_id, {m.label: to.repo for m in stack.members})
            content |= {f"{MEMBERS}/{member.adapter.name}/{file}": what for file, what in own.items()}
    curve = _picture([(m, registry.weights_path(m.version)) for m in stack.members])
    card = Card(
        name=name, repo=to.repo, base_id=to.base_id, rank=read_config(exported)["r"], is_stack=True, facts=to.facts,
        has_layer_weights=any(m.layer_weights for m in stack.members), method=stack.method,
        members=tuple(
            CardMember(
                m.adapter.name, _published(m), m.weight, m.adapter.description,
                f"{MEMBERS}/{m.adapter.name}" if members else None,
            )
            for m in stack.members
        ),
        has_picture=curve is not None, has_tokenizer=_has_tokenizer(content),
    )  # fmt: skip
    return {**content, **_picture_file(curve), CARD: render_card(card).encode()}


def _tokenizer_rank(registry: Registry, member: ResolvedMember) -> bool:
    folder = registry.weights_path(member.version)
    return any((folder / name).is_file() for name in _TOKENIZER)


def _has_tokenizer(content: dict[str, Content]) -> bool:
    return "tokenizer_config.json" in content


def _recipe(registry: Registry, stack: ResolvedStack, name: str) -> dict[str, Any]:
    """The stack's entry with every weight written out; of one that is not stored, as old as its newest member."""
    stored = registry.find_stack(stack.name) if stack.name else None
    created = stored.created if stored else max(m.version.created for m in stack.members)
    entry = Stack(
        name=name, base=_base_name(registry.weights_path(stack.members[0].version), stack.base),
        fingerprint=stack.base.fingerprint, method=stack.method, options=stack.options, members=[], created=created,
    )  # fmt: skip
    rows = [{**msgspec.to_builtins(m.entry()), "weight": m.weight} for m in stack.members]
    return {**msgspec.to_builtins(entry), "members": rows}


# -- the picture ----------------------------------------------------------------------------------------------------


def _picture(places: list[tuple[ResolvedMember, Path]]) -> str | None:
    return render_curve_svg({member.label: read_curve(folder) for member, folder in places})


def _picture_file(picture: str | None) -> dict[str, Content]:
    return {PICTURE: picture.encode()} if picture else {}


def check_pushable(registry: Registry, stack: ResolvedStack) -> None:
    """Make sure that there is something to push, and that its files are the ones that were registered.

    Raises:
        Usage, Incompatible, VerificationFailed: it is the base alone, it cannot be read, or files changed.
    """
    if not stack.members:
        raise Usage(f"'{stack.text}' is the base alone: there is nothing to push", hint="stackctl ls shows adapters")
    check_digests(registry, stack.members)
    for member in stack.members:
        if not read_checkpoint(registry.weights_path(member.version)).tensors:
            raise Incompatible(f"{member.label} holds no tensors", hint=f"stackctl inspect {member.label}")
