"""stackctl base add | ls | rm"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from stackctl.cli.command import REGISTRY, Context, Current, Group, command
from stackctl.cli.shared_options import TemplateOptions, argument, complete_bases
from stackctl.core.schema import Base
from stackctl.registry.store import Registry
from stackctl.render.output import Result

_EXAMPLES = """\
stackctl base add smollm2
stackctl base add mine ./models/mine
stackctl base add qwen3 Qwen/Qwen3-8B-Base --revision main"""
_SHOWN = (
    "name", "source", "revision", "fingerprint", "path", "architecture", "parameters", "dtype", "quantization",
    "context_length",
)  # fmt: skip


def base_json(base: Base, registry: Registry) -> dict[str, Any]:
    """A base as ``base ls`` and ``ls`` show it."""
    told = {name: getattr(base, name) for name in _SHOWN}
    path = str((registry.root / base.path).resolve()) if base.path else None
    return {**told, "path": path, "proved": msgspec.to_builtins(base.proved) if base.proved else None}


@command("add", example=_EXAMPLES)
def add(
    context: Context,
    name: Annotated[str, argument(help="What the base is called here.")],
    source: Annotated[
        str | None, argument(help="A Hub id, a folder, or a .gguf file; smollm2 needs none.", metavar="[SOURCE]")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of the Hub; pinned to its commit.")
    ] = None,
    prove: Annotated[
        bool | None,
        typer.Option(
            "--prove/--no-prove",
            help="Load it here and by transformers alone, and compare the logits; by default for weights of up to "
            "1 GB.",
            show_default=False,
        ),
    ] = None,
    *,
    arguments: TemplateOptions,
) -> Result:
    """Register a base model; its fingerprint identifies it from then on."""
    from stackctl.core.expressions import parse_name
    from stackctl.core.template_arguments import check_recorded
    from stackctl.registry.base_models import parse_source

    parse_name(name, "base name")
    parse_source(name, source, revision)  # what is wrong is said before anything heavy is loaded
    registry = context.registry
    from stackctl.engine.quick_imports import import_transformers

    import_transformers()
    from stackctl.engine.base.base_proof import is_small, prove_base
    from stackctl.engine.base.entry import make_base
    from stackctl.registry.base_entries import save_base

    before = registry.find_base(name)
    known = before.chat_template_kwargs if before and arguments.chat_template_kwargs is None else None
    template = arguments.template(known)
    check_recorded(template)
    base = make_base(name, source, revision, registry, context.output.status)
    base = msgspec.structs.replace(base, chat_template_kwargs=template or None)
    folder = context.base_folder(base)
    if is_small(folder) if prove is None else prove:
        base = msgspec.structs.replace(base, proved=prove_base(base, folder))
    save_base(registry, base)
    return _registered(base, before, folder, registry)


@command("ls", example="stackctl base ls --json")
def ls(context: Context) -> Result:
    """List the base models."""
    registry = context.registry
    rows = [base_json(base, registry) for base in registry.bases()]

    def screen() -> Any:
        from stackctl.render.tables import table

        return table(
            ["base", "source", "architecture", "parameters", "dtype"],
            [[r["name"], r["source"], r["architecture"], f"{r['parameters']:,}", r["dtype"]] for r in rows],
        )

    empty = "no base is registered; try: stackctl base add smollm2"
    return Result({"bases": rows}, "\n".join(r["name"] for r in rows), screen if rows else empty)


@command("rm", example="stackctl base rm qwen3")
def rm(context: Context, name: Annotated[str, argument(help="A base.", autocompletion=complete_bases)]) -> Result:
    """Remove a base's entry, never its files; refused while adapters depend on it."""
    from stackctl.registry.base_entries import remove_base

    remove_base(context.registry, name)
    return Result({"removed": [name]}, name, f"removed the base {name}; its files are where they were")


def base(app: typer.Typer) -> None:
    """Add the group and its commands to an app."""
    group = typer.Typer(cls=Group, help="Base models: add, ls, rm.", epilog="stackctl base add smollm2")
    app.add_typer(group, name="base", rich_help_panel=REGISTRY)
    for add_to in (add, ls, rm):
        add_to(group)

    @group.callback(invoke_without_command=True)
    def show_help(context: typer.Context) -> None:
        if context.invoked_subcommand is None:
            Current.output.text(context.get_help() + "\n")


def _registered(base: Base, before: Base | None, folder: Path, registry: Registry) -> Result:
    """What is said of a base that is registered now; ``before`` is the entry that its name had."""
    from stackctl.engine.base.entry import tokenizer_note
    from stackctl.registry.base_quantization import stored_scheme

    about = f"{base.architecture}, {base.parameters / 1e6:,.0f} M parameters, {base.dtype}"
    if scheme := stored_scheme(folder):
        about += f", stored by {scheme.label}"
    if base.proved:
        difference = f"{base.proved.difference:.0e}"
        about += f"\nits logits are those of transformers' own loading (largest difference {difference})"
    notes = []
    if before and (before.chat_template != base.chat_template or before.tokenizer not in (None, base.tokenizer)):
        notes.append(f"the tokenizer of {base.name} is another one than the one that was registered")
    if note := tokenizer_note(base, folder):
        notes.append(note)
    if base.untrained_tokens:
        tokens = ", ".join(base.untrained_tokens)
        notes.append(
            f"{base.name} never learned {tokens}, which chats begin and end with: their rows are as they were "
            "initialised; train --train-tokens auto trains them"
        )
    data = {**base_json(base, registry), "path": str(folder)}
    return Result(data, base.name, f"registered the base {base.name}: {about}\n{folder}", notes=tuple(notes))
