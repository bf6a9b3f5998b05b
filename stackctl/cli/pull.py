"""stackctl pull"""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from stackctl.cli.command import SHARE, Context, command
from stackctl.cli.shared_options import BaseOption, argument
from stackctl.core.command_line import typed
from stackctl.render.output import Result
from stackctl.storage.hashes import sha256_bytes

_EXAMPLES = """\
stackctl pull me/storyteller
stackctl pull somebody/some-lora --name borrowed --base smollm2
stackctl pull somebody/many-loras/style
stackctl pull me/storyteller@v1 --dry-run"""


@command("pull", example=_EXAMPLES, panel=SHARE)
def pull(
    context: Context,
    repo: Annotated[
        str,
        argument(
            metavar="REPO[/FOLDER][@REV]",
            help="A repo on the Hub with an adapter or a stack, or a folder of it; a branch, tag or commit.",
        ),
    ],
    name: Annotated[str | None, typer.Option(help="Name to register it under.")] = None,
    base: BaseOption = None,
    dry_run: Annotated[bool, typer.Option(help="Show what would be registered; fetch no weights.")] = False,
) -> Result:
    """Register what a repo on the Hub holds, pinned to the commit; files already here are not fetched again."""
    from stackctl.hub.pull import PullOptions
    from stackctl.hub.pull import pull as pull_repo
    from stackctl.hub.repos import parse_place

    registry, output = context.registry, context.output
    options = PullOptions(again=typed(), name=name, base=base, dry_run=dry_run, progress=output.shows_progress)
    return _result(pull_repo(registry, parse_place(repo), options, output.status))


def _result(pulled: Any) -> Result:
    shared = {
        "commit": pulled.commit, "repo": pulled.repo, "folder": pulled.folder or None, "added": list(pulled.added),
        "restored": list(pulled.restored), "dry_run": pulled.planned,
    }  # fmt: skip
    if pulled.stack is not None:
        members = [member.entry().json() for member in pulled.members]
        told = [[value for key, value in m.items() if key not in ("adapter", "version")] for m in members]
        digest = sha256_bytes(json.dumps(told).encode())
        data = {"stack": pulled.stack, "version": None, "digest": digest if members else None, "members": members}
        label = pulled.stack
    else:
        data = {"adapter": pulled.adapter, "version": pulled.version, "digest": pulled.digest}
        label = f"{pulled.adapter}@{pulled.version}"
    place = "/".join(filter(None, (pulled.repo, pulled.folder)))
    what = f"{label} from {place} at {pulled.commit[:12]}"
    news = ", ".join([*pulled.added, *(f"the files of {found}" for found in pulled.restored)])
    if pulled.planned:
        text = f"would pull {what}: {news or 'nothing new'}"
    elif news:
        text = f"pulled {what}: {news}"
    else:
        text = f"nothing to do: {what} is here already"
    return Result({**data, **shared}, label, text)
