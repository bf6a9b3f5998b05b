"""stackctl verify"""

from __future__ import annotations

from collections.abc import Iterator

import typer

from stackctl.bases import check_model_folder, fingerprint
from stackctl.cli.common import KNOW, Context, What, command
from stackctl.errors import StackctlError, VerificationFailed
from stackctl.output import Result
from stackctl.registry import Registry
from stackctl.schema import Base


def register(app: typer.Typer) -> None:
    @command(app, "verify", example="stackctl verify", panel=KNOW)
    def verify(context: Context, what: What = None) -> Result:
        """Rehash everything that is registered, or only what is named; exit code 5 when something is wrong."""
        registry = context.registry
        asked = registry.resolve(what) if what else None
        only = {member.label for member in asked.members} if asked else None
        with context.output.progress() as progress:
            task = progress.add_task("verifying", total=None)
            checked, problems = registry.verify(only, lambda label: progress.update(task, description=label))
        problems += _changed_bases(registry, [asked.base.name] if asked else registry.names(Base))
        checked += 1 if asked else 0
        if not problems:
            text = f"{checked} entries checked, nothing wrong"
        else:
            text = "\n".join(f"{p['what']}: {p['message']}" for p in problems)
            text += f"\n{checked} entries checked, {len(problems)} problems"
        code = VerificationFailed.exit_code if problems else 0
        return Result({"checked": checked, "problems": problems}, "\n".join(p["what"] for p in problems), text, code)


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
            folder = check_model_folder((registry.root / (base.path or base.source)).resolve())
            if fingerprint(folder) != base.fingerprint:
                yield {"what": name, "message": f"{folder} is not the model that was registered (fingerprints differ)"}
        except StackctlError as error:
            yield {"what": name, "message": error.message}
