"""What goes up to the Hub for an adapter or a stack: every file, made from the registry. Nothing is sent here.

The same entries give the same bytes, wherever the registry lies: that is how a push finds out that nothing changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from stackctl.core.command_line import CommandLine
from stackctl.core.errors import Incompatible, Usage
from stackctl.core.hub_ids import is_hub_id
from stackctl.core.schema import AdapterInfo, Base
from stackctl.hub.card import CARD, Card, CardFacts, render_card
from stackctl.hub.published import (
    ADAPTER_FILE,
    CHECKPOINT,
    MEMBERS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    checkpoint_files,
    own_base_name,
    published_config,
    published_entry,
    published_info,
    published_tokenizer_config,
)
from stackctl.hub.repos import Content
from stackctl.lora.checkpoint import CONFIG, WEIGHTS, read_checkpoint, read_config, read_info
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.checkpoint_files import check_digests, stays_inside
from stackctl.registry.resolve import ResolvedStack
from stackctl.registry.store import Registry
from stackctl.render.loss_curve import PICTURE, read_curve, render_curve_svg
from stackctl.storage.yaml_text import format_yaml

STACK = "stack.yaml"


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
    return path in {*CHECKPOINT, STACK, ADAPTER_FILE, PICTURE}


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


def bundle_adapter(registry: Registry, member: ResolvedMember, base: Base, to: Destination) -> dict[str, Content]:
    """The files of one adapter: its checkpoint at the root, its entry, its card."""
    info = published_info(registry, member, base, to.base_id, {})
    card = Card(
        member.adapter.name, to.repo, to.base_id, members=_as_published([member]), facts=to.facts,
        rank=max(member.version.lora.r, *member.version.lora.rank_pattern.values(), 0),
        foundations=tuple(info.trained_on),
    )  # fmt: skip
    return _with_card(registry, card, checkpoint_files(registry, member, base, to.base_id), [member])


def bundle_stack(
    registry: Registry, stack: ResolvedStack, name: str, to: Destination, exported: Path, *, members: bool
) -> dict[str, Content]:
    """The files of a stack: the one adapter that is its sum, the recipe, the card, and its members if asked for.

    Args:
        exported: the folder with the stack as one PEFT adapter; it must last until the push is over.
    """
    content: dict[str, Content] = {WEIGHTS: exported / WEIGHTS, CONFIG: published_config(exported, to.base_id)}
    folders = [(m.version.created, registry.weights_path(m.version)) for m in stack.members]
    _, source = max(folders, key=lambda found: (any((found[1] / file).is_file() for file in TOKENIZER_FILES), found[0]))
    content |= {file: path for file in TOKENIZER_FILES if (path := source / file).is_file() and stays_inside(path)}
    if TOKENIZER_CONFIG in content:
        content[TOKENIZER_CONFIG] = published_tokenizer_config(source / TOKENIZER_CONFIG)
    content[STACK] = format_yaml(_recipe(registry, stack, name)).encode()
    for member in stack.members if members else ():
        own = checkpoint_files(registry, member, stack.base, to.base_id, {m.label: to.repo for m in stack.members})
        content |= {f"{MEMBERS}/{member.adapter.name}/{file}": what for file, what in own.items()}
    card = Card(
        name, to.repo, to.base_id, members=_as_published(stack.members), facts=to.facts, is_stack=True,
        rank=read_config(exported)["r"], has_members=members, method=stack.method,
    )  # fmt: skip
    return _with_card(registry, card, content, stack.members)


def _as_published(members: Sequence[ResolvedMember]) -> tuple[ResolvedMember, ...]:
    return tuple(replace(member, version=published_entry(member)) for member in members)


def _with_card(
    registry: Registry, card: Card, content: dict[str, Content], of: Sequence[ResolvedMember]
) -> dict[str, Content]:
    """Files with the card that tells of them, and the picture in it, where there is one."""
    picture = render_curve_svg({m.label: read_curve(registry.weights_path(m.version)) for m in of})
    card = replace(card, has_picture=picture is not None, has_tokenizer=TOKENIZER_CONFIG in content)
    return {**content, **({PICTURE: picture.encode()} if picture else {}), CARD: render_card(card).encode()}


def _recipe(registry: Registry, stack: ResolvedStack, name: str) -> dict[str, Any]:
    """The stack's entry with every weight written out; of one that is not stored, as old as its newest member."""
    stored = registry.find_stack(stack.name) if stack.name else None
    created = stored.created if stored else max(m.version.created for m in stack.members)
    entry = msgspec.to_builtins(stack.entry(name, created))
    rows = [{**row, "weight": member.weight} for row, member in zip(entry["members"], stack.members, strict=True)]
    return {
        **entry,
        "base": own_base_name(registry.weights_path(stack.members[0].version), stack.base),
        "members": rows,
    }


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
