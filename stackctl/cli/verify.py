"""stackctl verify"""

from __future__ import annotations

import typer

from stackctl.cli.common import KNOW, Context, What, command
from stackctl.errors import VerificationFailed
from stackctl.output import Result


def register(app: typer.Typer) -> None:
    @command(app, "verify", example="stackctl verify", panel=KNOW)
    def verify(context: Context, what: What = None) -> Result:
        """Rehash everything that is registered, or only what is named; exit code 5 when something is wrong."""
        registry = context.registry
        only = {member.label for member in registry.resolve(what).members} if what else None
        with context.output.progress() as progress:
            task = progress.add_task("verifying", total=None)
            checked, problems = registry.verify(only, lambda label: progress.update(task, description=label))
        if not problems:
            text = f"{checked} entries checked, nothing wrong"
        else:
            text = "\n".join(f"{p['what']}: {p['message']}" for p in problems)
            text += f"\n{checked} entries checked, {len(problems)} problems"
        code = VerificationFailed.exit_code if problems else 0
        return Result({"checked": checked, "problems": problems}, "\n".join(p["what"] for p in problems), text, code)
