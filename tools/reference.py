"""Write docs/reference/cli.md from the commands themselves; ``--check`` fails when the page is stale."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from stackctl.cli.help_page import first_paragraph, option_choices, option_default, usage

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
_HEAD = """# The commands

Written by `make docs` from the commands themselves; `make check` fails when it is stale.

Options that every command has: `--registry DIR`, `--json`, `--quiet`/`-q`, `--debug`, `--help`/`-h`.
"""
_COMMON = {"registry", "json_mode", "quiet", "debug", "help"}


def render() -> str:
    """The page as it should be now."""
    import typer

    from stackctl.cli import make_app

    group: Any = typer.main.get_command(make_app())
    parts = [_HEAD]
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            parts += [_section(f"{name} {sub}", inner) for sub, inner in command.commands.items()]
        else:
            parts.append(_section(name, command))
    return "\n".join(parts)


def _section(name: str, command: Any) -> str:
    options = [p for p in command.params if p.param_type_name == "option" and p.name not in _COMMON]
    lines = [f"## {name}\n", first_paragraph(command.help), f"\n```\n{usage(command, f'stackctl {name}')}\n```\n"]
    if options:
        lines += ["| option | meaning | default |", "| --- | --- | --- |"]
        lines += [f"| {_names(o)} | {_meaning(o)} | {option_default(o)} |" for o in options]
        lines.append("")
    examples = (command.epilog or "").splitlines()
    lines.append(f"Example{'s' if len(examples) > 1 else ''}:\n\n```\n" + "\n".join(examples) + "\n```\n")
    return "\n".join(lines)


def _meaning(option: Any) -> str:
    choices = option_choices(option)
    return f"{option.help or ''}{' [' + ', '.join(choices) + ']' if choices else ''}".replace("|", "\\|")


def _names(option: Any) -> str:
    return " ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])


def main() -> int:
    os.environ.setdefault("COLUMNS", "100")
    page = render()
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
            sys.stderr.write(f"{PAGE} is stale: run make docs\n")
            return 1
        return 0
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
