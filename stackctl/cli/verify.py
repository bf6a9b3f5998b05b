"""stackctl verify"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from stackctl.cli.command import INSPECT, Context, command
from stackctl.cli.shared_options import expression
from stackctl.core.errors import StackctlError, Usage, VerificationFailed
from stackctl.core.schema import Base
from stackctl.hub.repair import RepairSource, find_sources
from stackctl.hub.repair import repair as repair_version
from stackctl.registry.adapters import ResolvedMember
from stackctl.registry.base_models import check_linked_base
from stackctl.registry.resolve import ResolvedStack, resolve_expression
from stackctl.registry.store import Registry
from stackctl.registry.verify import bytes_to_verify, verify_registry
from stackctl.render.output import Result
from stackctl.render.terminal import counted
from stackctl.storage.paths import existing_path

_EXAMPLES = """\
stackctl verify storyteller
stackctl verify --repair --from backup/weights
stackctl verify --repair"""


@command("verify", example=_EXAMPLES, panel=INSPECT)
def verify(
    context: Context,
    what: Annotated[
        str | None,
        expression(help="An adapter, a stack or an expression; everything that is registered when left out."),
    ] = None,
    repair: Annotated[
        bool, typer.Option(help="Restore missing or changed files from any copy with the same digest.")
    ] = False,
    from_: Annotated[
        Path | None, typer.Option("--from", help="With --repair: a folder to search first.", metavar="FOLDER")
    ] = None,
) -> Result:
    """Rehash all registered files, or only those of WHAT; exit code 5 when something is wrong.

    What is missing or changed, and where it can be had from, is listed. --repair brings it back: from a copy in the
    registry, or from the repository on the Hub that the entry records. Intact files are left alone.
    """
    if from_ is not None and not repair:
        raise Usage("--from belongs to --repair", hint=f"stackctl verify --repair --from {shlex.quote(str(from_))}")
    if from_ is not None:
        existing_path(from_, "the folder")
    registry = context.registry
    asked = resolve_expression(registry, what) if what else None
    damaged: list[ResolvedMember] = []
    checked, problems = _hash(context, asked, damaged)
    problems += _changed_bases(registry, [asked.base.name] if asked else registry.names(Base))
    checked += 1 if asked else 0
    sources = find_sources(registry, damaged, from_)
    restored = []
    if repair:
        registry.sweep()
        restored = _restore(context, damaged, sources, problems)
    for problem in problems:
        found = sources.get(problem["what"]) if not repair else None
        problem["restore"] = found[0].json() if found else None
    data = {"checked": checked, "problems": problems, "restored": restored}
    code = VerificationFailed.exit_code if problems else 0
    return Result(data, "\n".join(p["what"] for p in problems), _screen(data), code)


def _hash(
    context: Context, asked: ResolvedStack | None, damaged: list[ResolvedMember]
) -> tuple[int, list[dict[str, Any]]]:
    registry = context.registry
    only = {member.label for member in asked.members} if asked else None
    if not context.output.shows_progress:
        return verify_registry(registry, only, damaged=damaged.append)
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    total = sum(m.version.bytes for m in asked.members) if asked else bytes_to_verify(registry)
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with context.output.progress(*columns) as progress:
        task = progress.add_task("verifying", total=total)
        return verify_registry(
            registry,
            only,
            lambda label: progress.update(task, description=f"verifying {label}"),
            damaged.append,
            lambda count: progress.advance(task, count),
        )


def _restore(
    context: Context,
    damaged: list[ResolvedMember],
    sources: dict[str, list[RepairSource]],
    problems: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Bring back what can be, one version after the other; ``problems`` are then those that are left."""
    restored = []
    output = context.output
    for member in damaged:
        problem = next(p for p in problems if p["what"] == member.label)
        try:
            source = repair_version(
                context.registry, member, sources[member.label], output.status, progress=output.shows_progress
            )
        except StackctlError as error:
            problem["message"] += f"; {error.message}"
            continue
        restored.append({"what": member.label, **source.json()})
        problems.remove(problem)
        problems += verify_registry(context.registry, {member.label})[1]
    return restored


def _screen(data: dict[str, Any]) -> str:
    lines = [f"{found['what']}: restored from {found['place']}" for found in data["restored"]]
    lines += [f"{problem['what']}: {problem['message']}" for problem in data["problems"]]
    restorable = {p["what"]: p["restore"]["place"] for p in data["problems"] if p["restore"]}
    wrong = counted(len(data["problems"]), "problem") if data["problems"] else "nothing wrong"
    lines.append(f"{counted(data['checked'], 'entry', 'entries')} checked, {wrong}")
    if restorable:
        lines += [f"{what} can be restored from {place}" for what, place in restorable.items()]
        lines.append("to restore: stackctl verify --repair")
    return "\n".join(lines)


def _changed_bases(registry: Registry, names: list[str]) -> Iterator[dict[str, str]]:
    """Bases whose folder is gone or holds another model now; what lies in a cache is checked whenever it is loaded."""
    for name in names:
        try:
            base = registry.find_base(name)
        except StackctlError:
            continue  # an entry that cannot be read is a problem of the registry's own
        if base is None or base.kind != "folder":
            continue
        try:
            check_linked_base(base, registry.root)
        except StackctlError as error:
            yield {"what": name, "message": error.message}
