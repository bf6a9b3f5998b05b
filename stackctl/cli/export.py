"""stackctl export"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from stackctl.cli.command import SHARE, Context, command
from stackctl.cli.shared_options import BaseOption, What
from stackctl.core.errors import Usage
from stackctl.plan.lint import GGUF_DTYPES
from stackctl.plan.stack_plan import StackPlan
from stackctl.plan.whole_class import on_whole_class
from stackctl.registry.checkpoint_files import check_digests
from stackctl.registry.planning import plan_expression
from stackctl.render.output import Result
from stackctl.storage.files import human_bytes
from stackctl.storage.hashes import sha256_file

_DTYPES = {
    "peft": ("float32", "bfloat16", "float16"),
    "model": ("auto", "float32", "bfloat16", "float16"),
    "gguf": GGUF_DTYPES,
    "mlx": ("auto", "float32", "bfloat16", "float16"),
}
"""What each format can be written in; the first one is its default."""

_EXAMPLES = """\
stackctl export storyteller --format gguf --out storyteller-gguf
stackctl export storyteller --format model --dtype bfloat16 --out storyteller-model
stackctl export storyteller --format peft --out storyteller-peft"""


@dataclass(frozen=True)
class _FormatOptions:
    """What only one format has; each field is an option."""

    modelfile: Annotated[bool, typer.Option(help="With gguf: also write a Modelfile, for Ollama before 0.34.1.")] = (
        False
    )
    whole_class: Annotated[
        bool,
        typer.Option(
            help="With peft, for a model that also takes images: names of the class in config.json, as vLLM wants."
        ),
    ] = False


@command("export", example=_EXAMPLES, panel=SHARE)
def export(
    context: Context,
    what: What = None,
    format_: Annotated[
        Literal["peft", "model", "gguf", "mlx"],
        typer.Option(
            "--format",
            help="peft: one plain LoRA for PEFT and vLLM; model: the base with the stack in it; "
            "gguf: a LoRA for llama.cpp; mlx: one for mlx-lm.",
        ),
    ] = "peft",
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; must not exist yet, or be empty.", metavar="DIR")
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(
            help="Precision of what is written; auto is float32, for a model the base's own, for mlx the adapter's."
        ),
    ] = "auto",
    *,
    extra: _FormatOptions,
    base: BaseOption = None,
) -> Result:
    """Export a stack as files for another program: streamed, checked, then moved into place."""
    registry = context.registry
    stack, plan = plan_expression(registry, what, base=base)
    if out is None:
        raise Usage("--out is missing", hint=f"stackctl export {stack.text} --format {format_} --out DIR")
    _check_place(out)
    if extra.modelfile and format_ != "gguf":
        hint = f"stackctl export {stack.text} --format gguf --modelfile --out {shlex.quote(str(out))}"
        raise Usage("--modelfile belongs to --format gguf", hint=hint)
    if extra.whole_class and format_ != "peft":
        raise Usage("--whole-class belongs to --format peft", hint="leave it out")
    wanted = _DTYPES[format_][0] if dtype == "auto" else dtype
    if wanted not in _DTYPES[format_]:
        raise Usage(f"{format_} is not written in {dtype}", hint=f"choose --dtype {' or '.join(_DTYPES[format_])}")
    plan = on_whole_class(plan) if extra.whole_class else plan
    check_digests(registry, stack.members)
    report = _write(context, plan, format_, out.absolute(), wanted, modelfile=extra.modelfile)
    written = _files(out, report.pop("digests", {}))
    size = human_bytes(sum(file["bytes"] for file in written))
    data = {"format": format_, "path": str(out.absolute()), "files": written, "dtype": wanted, **report}
    text = f"wrote {stack.text} to {out}: {format_}, rank {report['rank']}, {data['dtype']}, {size}"
    if report["max_relative_error"]:
        text += f", at most {report['max_relative_error']:.1e} of a module's delta lost"
    return Result(data, str(out), text, notes=stack.notes)


def _check_place(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Usage(f"{out} already exists", hint="choose another folder, or remove it first")
    if files := [above for above in out.absolute().parents if above.is_file()]:
        raise Usage(f"{files[0]} is a file, so that {out} cannot be a folder", hint="choose another folder")


def _write(
    context: Context, plan: StackPlan, format_: str, out: Path, dtype: str, *, modelfile: bool
) -> dict[str, Any]:
    """Write the files; returns rank, max_relative_error, exact, and digests of files where they are known already."""
    if format_ == "mlx":
        from stackctl.engine.export.mlx import export_mlx

        return export_mlx(plan, out, dtype=dtype)
    find_folder = functools.partial(context.base_folder, plan.known_base)
    if format_ == "peft":
        from stackctl.engine.export.peft import export_peft

        return export_peft(plan, out, dtype=dtype, base=find_folder)
    from stackctl.engine.quick_imports import import_transformers
    from stackctl.registry.base_models import base_gguf

    import_transformers()
    if format_ == "gguf":
        from stackctl.engine.export.gguf import export_gguf

        gguf = base_gguf(plan.known_base, context.registry.root)
        return export_gguf(plan, find_folder(), out, dtype=dtype, modelfile=modelfile, base_gguf=gguf)
    from stackctl.engine.export.model import export_model

    return export_model(plan, find_folder(), out, dtype=dtype)


def _files(out: Path, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every file in a folder; those whose digests are known by their names are not hashed again."""
    return [
        {
            "path": str(path.relative_to(out)),
            "bytes": path.stat().st_size,
            "sha256": (digests.get(path.name) or sha256_file(path)).removeprefix("sha256:"),
        }
        for path in sorted(out.rglob("*"))
        if path.is_file()
    ]
