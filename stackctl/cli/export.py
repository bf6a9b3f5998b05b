"""stackctl export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from stackctl.cli.common import SHARE, BaseOption, Context, What, command
from stackctl.errors import Usage
from stackctl.files import human_bytes, sha256_file
from stackctl.output import Result


def register(app: typer.Typer) -> None:
    @command(app, "export", example="stackctl export storyteller --format peft --out storyteller-peft", panel=SHARE)
    def export(
        context: Context,
        what: What = None,
        format_: Annotated[
            Literal["peft"], typer.Option("--format", help="peft: one plain LoRA that PEFT and vLLM load.")
        ] = "peft",
        out: Annotated[Path | None, typer.Option(help="The folder to write; must not exist.", metavar="DIR")] = None,
        dtype: Annotated[
            Literal["float32", "bfloat16", "float16"], typer.Option(help="Precision of what is written.")
        ] = "float32",
        base: BaseOption = None,
    ) -> Result:
        """Write a stack as files for another program: streamed, read back and checked, then moved into place."""
        registry = context.registry
        stack = registry.resolve(what, base=base)
        plan = registry.plan(stack).check()
        if out is None:
            raise Usage("--out is missing", hint=f"stackctl export {stack.text} --out {stack.name or 'exported'}")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise Usage(f"{out} already exists", hint="choose another folder, or remove it first")
        registry.check_digests(stack.members)
        from stackctl.engine.export import export_peft

        report = export_peft(plan, out.absolute(), dtype=dtype)
        written = [
            {"path": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path).removeprefix("sha256:")}
            for path in sorted(out.iterdir())
        ]
        total = human_bytes(sum(path.stat().st_size for path in out.iterdir()))
        data = {"format": format_, "path": str(out.absolute()), "files": written, **report}
        text = f"wrote {out}: {format_}, rank {report['rank']}, {dtype}, {total}"
        if report["max_relative_error"]:
            text += f", largest relative error {report['max_relative_error']:.1e}"
        return Result(data, str(out), text, notes=stack.notes)
