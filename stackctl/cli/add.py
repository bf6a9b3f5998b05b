"""stackctl add"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from stackctl.cli.add_converted import Conversion, add_converted
from stackctl.cli.command import REGISTRY, Context, command
from stackctl.cli.shared_options import DESCRIPTION, NEW_ADAPTER, BaseOption, argument, complete_what
from stackctl.core.errors import Incompatible, Usage, raise_all
from stackctl.core.schema import AdapterVersion
from stackctl.lora.checkpoint import Checkpoint, find_checkpoint_folder, read_checkpoint, read_info
from stackctl.lora.kohya import find_kohya, read_kohya
from stackctl.lora.mlx import is_mlx, read_mlx
from stackctl.lora.no_effect import NO_EFFECT, has_no_effect
from stackctl.plan.build import plan_stack
from stackctl.plan.refusals import no_plain_lora
from stackctl.plan.stack_plan import PlanMember
from stackctl.registry.base_matching import StatedBase, choose_base
from stackctl.registry.checkpoint_files import check_links, copy_checkpoint
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.registry.versions import (
    NewVersion,
    add_version,
    check_adapter_name,
    entry_of,
    find_same_version,
    register_checkpoint,
    version_facts,
)
from stackctl.render.output import Result
from stackctl.storage import atomic
from stackctl.storage.paths import portable_path

_EXAMPLES = """\
stackctl add instruct ./output/stage2/instruct --on style
stackctl add style ./output/checkpoint-531 --base qwen3
stackctl add style ./output/dora --convert --tolerance 0.05"""


@dataclass(frozen=True)
class _PlaceOptions:
    """Where an adapter comes to stand; each field is an option."""

    base: BaseOption = None
    on: Annotated[
        str | None, typer.Option(help="The stack that it was trained on.", autocompletion=complete_what, metavar="EXPR")
    ] = None
    link: Annotated[bool, typer.Option(help="Refer to the folder instead of copying it.")] = False
    description: DESCRIPTION = ""


@command("add", example=_EXAMPLES, panel=REGISTRY)
def add(
    context: Context,
    name: NEW_ADAPTER,
    path: Annotated[
        Path,
        argument(
            help="A PEFT checkpoint: its folder, a Trainer's checkpoint-531/, or one above it; mlx-lm's folder; or "
            "the .safetensors file of sd-scripts or LyCORIS."
        ),
    ],
    *,
    place: _PlaceOptions,
    wanted: Conversion,
) -> Result:
    """Register an existing PEFT checkpoint as the next version of an adapter."""
    registry = context.registry
    raise_all(wanted.problems(link=place.link))
    check_adapter_name(registry, name)
    request = _Request(name, place, wanted, base=place.base)
    if is_mlx(path):
        return _add_mlx(context, path, request)
    if file := find_kohya(path):
        return _add_kohya(context, file, request)
    return _register(context, find_checkpoint_folder(path), request)


@dataclass(frozen=True)
class _Request:
    """What is to be added, and how."""

    name: str
    place: _PlaceOptions
    wanted: Conversion
    base: str | None
    from_mlx: bool = False

    def new(self, stack: ResolvedStack) -> NewVersion:
        return NewVersion(self.name, stack.base, stack.terms(), self.place.description)


def _add_mlx(context: Context, path: Path, request: _Request) -> Result:
    """Register an adapter of mlx-lm."""
    _refuse_link(request, "mlx-lm")
    adapter = read_mlx(path)
    if adapter.is_dora and not request.wanted.convert:
        then = shlex.join(["stackctl", "add", request.name, str(path), "--convert"])
        raise Incompatible(f"{path} is a DoRA of mlx-lm, no sum of deltas", hint=f"make a plain LoRA of it: {then}")
    from stackctl.engine.to_lora.foreign_adapters import write_mlx_as_peft

    with atomic.staging_directory(context.registry.root / "weights") as staged:
        write_mlx_as_peft(adapter, staged)
        return _register(context, staged, replace(request, from_mlx=True))


def _add_kohya(context: Context, file: Path, request: _Request) -> Result:
    """Register a LoRA in one file, whose names only a base resolves."""
    _refuse_link(request, "sd-scripts and LyCORIS")
    base = resolve_expression(context.registry, request.place.on or "base", base=request.base).base
    adapter = read_kohya(file, base)
    from stackctl.engine.to_lora.foreign_adapters import write_kohya_as_peft

    with atomic.staging_directory(context.registry.root / "weights") as staged:
        write_kohya_as_peft(adapter, staged)
        return _register(context, staged, replace(request, base=None if request.place.on else base.name))


def _refuse_link(request: _Request, program: str) -> None:
    if request.place.link:
        raise Usage(f"--link refers to PEFT's files, and those of {program} are laid out anew", hint="leave out --link")


def _register(context: Context, folder: Path, request: _Request) -> Result:
    """Register the PEFT checkpoint in a folder."""
    registry, name, wanted, on = context.registry, request.name, request.wanted, request.place.on
    left_out = check_links(folder)
    checkpoint = read_checkpoint(folder)
    member = PlanMember(name, 1.0, checkpoint, name)
    kind = wanted.kind(checkpoint)
    if no_plain_lora(member) and not kind:
        plan_stack(None, [member]).check()
    own, unknown = None, ""
    if not on and not request.base:
        own, unknown = choose_base(registry, StatedBase.of(checkpoint.config, read_info(folder)), checkpoint.digest)
    stack = resolve_expression(registry, on or "base", base=own.name if own else request.base)
    if kind:
        return add_converted(context, wanted, checkpoint, stack, request.new(stack))
    plan = plan_stack(stack.base, [member])
    if unknown and plan.errors:
        raise Incompatible(
            f"its base is '{unknown}', which is not registered, and it does not fit '{stack.base.name}'",
            hint=f"register it: {shlex.join(['stackctl', 'base', 'add', 'NAME', unknown])}",
        )
    plan.check()
    if request.from_mlx and stack.base.tied_embeddings and stack.base.input_embedding in plan.modules:
        raise Incompatible(
            "it adapts the embedding, which is one weight with the head in mlx-lm, and PEFT adapts it alone",
            hint="fuse it (mlx_lm.fuse), then: stackctl extract NAME --base B --tuned FOLDER",
        )
    if checkpoint.copies:
        from stackctl.engine.base.weight_copies import check_copies

        check_copies(checkpoint, stack.base, context.base_folder(stack.base))
    known = find_same_version(registry, name, checkpoint.digest(), stack)
    version = known or _add(registry, request.new(stack), checkpoint, link=request.place.link)
    label = f"{name}@{version.version}"
    data = version_facts(registry, name, version, stack.base.name)
    where = f"on {stack.pinned} of {stack.base.name}" if stack.members else f"on {stack.base.name}"
    said = f"{label} is registered already" if known else f"registered {label}"
    text = f"{said}: rank {plan.rank}, {version.parameters:,} parameters, {where}"
    notes = [p.message for p in plan.problems]
    if unknown:
        told = f"its base is '{unknown}', which is not registered; it is registered on '{stack.base.name}'"
        notes.append(f"{told} (--base chooses another)")
    if left_out:
        notes.append(f"{', '.join(left_out)}: links out of {folder}, which are not followed")
    if has_no_effect(checkpoint):
        notes.append(f"{label} {NO_EFFECT}")
    return Result(data, label, text, notes=tuple(notes))


def _add(registry: Registry, new: NewVersion, checkpoint: Checkpoint, *, link: bool) -> AdapterVersion:
    if link:
        path = _linked_path(checkpoint.path.resolve(), registry.root)

        def build(number: int) -> AdapterVersion:
            return entry_of(number, path, checkpoint, new.base, new.on)

        return add_version(registry, new.name, build, None, new.description or None)
    with atomic.staging_directory(registry.root / "weights") as staged:
        copy_checkpoint(checkpoint.path, staged)
        return register_checkpoint(registry, new, staged)


def _linked_path(folder: Path, root: Path) -> str:
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise Usage(
            f"the name of {folder} is not Unicode, and entries are", hint="leave out --link, so that it is copied"
        ) from None
    return portable_path(folder, root)
