"""The command line. One short file per command; this one only puts them together."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shlex
import signal
import sys
import traceback
from importlib import import_module
from typing import Annotated, Any

import typer

from stackctl.cli.command import Current, Group
from stackctl.cli.completion import completing
from stackctl.cli.help_page import WIDTH, option_choices
from stackctl.cli.signals import TerminatedBySignal, ending_signals, keep_exit_code
from stackctl.core.errors import (
    Interrupted,
    StackctlError,
    Terminated,
    Usage,
    did_you_mean,
    explain_oserror,
    memory_error,
    system_error,
)
from stackctl.core.library_messages import reword_message
from stackctl.jobs.ranks import is_worker, make_output
from stackctl.machine.processes import on_signals

_COMMANDS = {
    "demo": "demo.demo", "train": "train.train", "distil": "distil.distil", "compose": "compose.compose",
    "generate": "generate.generate", "compare": "compare.compare", "eval": "eval.evaluate",
    "inspect": "inspect.inspect", "bisect": "bisect.bisect", "ls": "ls.ls", "verify": "verify.verify",
    "doctor": "doctor.doctor", "export": "export.export", "serve": "serve.serve", "push": "push.push",
    "push-to-hub": "push.push_to_hub", "pull": "pull.pull", "init": "init.init", "base": "base.base", "add": "add.add",
    "extract": "extract.extract", "use": "use.use", "rm": "rm.rm", "gc": "gc.gc",
}  # fmt: skip
"""Commands in the order that --help shows them, with the module and the function; no module imports anything heavy."""
_LINES = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
"""Where typer's scripts put the line that a shell completes: bash, and the others."""


def make_app(command: str | None = None) -> typer.Typer:
    """The app with all its commands, or with the one that was typed: building them all takes longer than most run."""
    app = typer.Typer(
        name="stackctl",
        cls=Group,
        help="Train, compose, prove and ship stacks of LoRA adapters: W = W_base + ΔW_style + ΔW_instruct.",
        epilog="stackctl demo",
        invoke_without_command=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH},
    )

    @app.callback()
    def stackctl(
        context: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Show the version.", is_eager=True)] = False,
    ) -> None:
        if version:
            from stackctl import __version__

            Current.output.text(f"stackctl {__version__}\n")
            raise typer.Exit
        if context.invoked_subcommand is None:
            Current.output.text(context.get_help() + "\n")
            raise typer.Exit

    for place in [_COMMANDS[command]] if command in _COMMANDS else _COMMANDS.values():
        module, _, function = place.partition(".")
        getattr(import_module(f"stackctl.cli.{module}"), function)(app)
    return app


@functools.cache
def built_app(command: str | None) -> Any:
    """The app with the command that was typed, built once for all that a process runs of it."""
    return typer.main.get_command(make_app(command))


def main() -> None:
    """Run a command and end with its exit code; the whole policy on errors is here."""
    from stackctl.render.output import prepare_streams, release_streams

    prepare_streams()
    early = make_output(json_mode="--json" in sys.argv)  # until the command line is read
    Current.output, Current.debug, Current.path, Current.registry = early, False, "stackctl", None
    try:
        with ending_signals(), completing(os.environ):
            code = built_app(_typed_command()).main(prog_name="stackctl", standalone_mode=False)
        code = code if isinstance(code, int) else 0
        if code == Interrupted.exit_code:
            raise KeyboardInterrupt
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has gone, as in `stackctl ls | head`
        code = 1
    except (Exception, KeyboardInterrupt, TerminatedBySignal) as error:
        with on_signals(signal.SIG_IGN, [signal.SIGINT]):  # who presses Ctrl-C twice still reads how it ended
            told = _as_ours(error)
            told.hint = _in_registry(told.hint)
            with contextlib.suppress(OSError):  # on a full disk its words do not fit, either
                if Current.debug:
                    traceback.print_exc()
                Current.output.error(told)
        code = told.exit_code
    if code == Interrupted.exit_code:
        keep_exit_code()
    release_streams()
    sys.exit(code)


def _as_ours(error: BaseException) -> StackctlError:
    """Whatever ended a command, as one of the project's errors."""
    if isinstance(error, typer.Abort) and isinstance(error.__cause__, EOFError):  # nothing here asks: it is a bug's
        error = error.__cause__
    if isinstance(error, StackctlError):
        return error
    if isinstance(error, TerminatedBySignal):
        return Terminated("terminated", hint="run the command again to go on")
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return Interrupted("interrupted", hint="run the command again to go on")
    if isinstance(error, typer.TyperException):
        return _usage_error(error)
    if (said := system_error(error)) is not None:
        return explain_oserror(said)
    if (full := memory_error(error)) is not None:
        return full
    from stackctl.core.broken_imports import import_error

    if (broken := import_error(error)) is not None:
        return broken
    return StackctlError(f"{type(error).__name__}: {error}", hint="this is a bug; --debug shows where it happened")


def _in_registry(hint: str | None) -> str | None:
    """A hint whose commands name the registry that was typed: without it they would look for another."""
    if not hint or Current.registry is None or "--registry" in hint or is_worker():  # whose launcher typed it
        return hint
    option = f" --registry {shlex.quote(str(Current.registry))}"
    names = "|".join(sorted(_COMMANDS.keys() - {"init", "base"}, key=len, reverse=True))
    return re.sub(rf"\bstackctl (?:base [a-z]+|{names})\b(?!-)", lambda found: found[0] + option, hint)


def _typed_command() -> str | None:
    """The first word after ``stackctl``, of this command or of the one that a shell completes."""
    line = next((os.environ[name] for name in _LINES if name in os.environ), "")
    words = line.split() if "_STACKCTL_COMPLETE" in os.environ else sys.argv
    return words[1] if len(words) > 1 else None


def _usage_error(error: Any) -> Usage:
    """What typer says of a command line, in the voice of all other errors."""
    message = reword_message(error.format_message())
    context: Any = getattr(error, "ctx", None)
    hint = f"{context.command_path if context else Current.path} --help"
    if hasattr(error, "possibilities"):  # an option that there is not
        names = [name for p in context.command.get_params(context) for name in (*p.opts, *p.secondary_opts)]
        message, hint = f"there is no option {error.option_name}", did_you_mean(error.option_name, names, hint)
        if hasattr(context.command, "commands"):
            hint = f"options come after the command: {context.command_path} COMMAND {error.option_name}"
    elif (parameter := getattr(error, "param", None)) and (choices := option_choices(parameter)):
        word = re.match("'([^']*)' is not one of", str(error.message))
        hint = did_you_mean(word[1], choices, hint) if word else hint
    return Usage(message, hint=hint)
