"""Commands in processes of their own that have torch from the start: forked off one that loaded it and never worked.

What such a process is not: ``python -m stackctl`` from its first line, which the end-to-end tests start.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["stackctl.engine.training", "stackctl.engine.serving", "stackctl.serving.app"])


class Command:
    """A command that runs: of ``subprocess.Popen`` what tests need."""

    def __init__(self, arguments: list[str], folder: Path, out: Path, errors: Path, **environment: str) -> None:
        told = (arguments, folder, out, errors, {**os.environ, **environment})
        self._process = SERVER.Process(target=_be_the_command, args=told)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired("stackctl", timeout)
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()


def redirect(out: int, errors: int) -> None:
    """Make two open files this process's streams, and nothing its input."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out, 1)
    os.dup2(errors, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115


def run_and_exit(arguments: list[str]) -> NoReturn:
    """Be ``stackctl ARGUMENTS`` from here on."""
    code = 99
    try:
        from stackctl.cli import main

        sys.argv = ["stackctl", *arguments]
        main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _be_the_command(arguments: list[str], folder: Path, out: Path, errors: Path, environment: dict[str, Any]) -> None:
    redirect(*(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600) for path in (out, errors)))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    run_and_exit(arguments)
