"""Commands in processes of their own that have torch from the start: forked off one that loaded it and never worked.

What such a process is not: ``python -m stackctl`` from its first line, which the end-to-end tests start.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from multiprocessing import connection, forkserver, resource_tracker
from pathlib import Path
from typing import Any, NoReturn

SERVER = multiprocessing.get_context("forkserver")
LOADED = ("stackctl.engine.training.run", "stackctl.engine.serving.batching", "stackctl.serving.app")
SERVER.set_forkserver_preload(list(LOADED))


def start() -> None:
    """Fork the server off this process, in which torch has not worked yet: by itself it would load all of it again."""
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    if server._forkserver_pid is not None:
        return
    for name in LOADED:
        importlib.import_module(name)
    said, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)  # at the end it complains of what killed commands did not give back
    resource_tracker.ensure_running()
    os.dup2(said, 2)
    os.close(said)
    os.close(nothing)
    address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    alive, kept = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        pid = os.fork()
        if not pid:
            os.close(kept)
            try:
                forkserver.main(os.dup(listener.fileno()), alive, None)  # type: ignore[arg-type]
            finally:
                os._exit(0)
    os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, kept, pid


class Command:
    """A command that runs: of ``subprocess.Popen`` what tests need."""

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        out: Path,
        errors: Path,
        environment: dict[str, str] | None = None,
        **more: str,
    ) -> None:
        """``more`` is added to ``environment``, or to that of this process."""
        told = (arguments, folder, out, errors, {**(os.environ if environment is None else environment), **more})
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


def run(
    arguments: list[str], folder: Path, environment: dict[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` of a command, with its output as text."""
    with tempfile.TemporaryDirectory() as place:
        out, errors = Path(place, "stdout"), Path(place, "stderr")
        code = Command(arguments, folder, out, errors, environment).wait(timeout)
        return subprocess.CompletedProcess(arguments, code, out.read_text(), errors.read_text())


class Launcher:
    """In place of accelerate's launcher: the processes that it would start, with what it tells them."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: Any, **_: Any) -> None:
        count = command[command.index("--num_processes") + 1]
        arguments, log = command[command.index("stackctl") + 1 :], Path(stdout.name)
        from torch.distributed import TCPStore

        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # a port nobody can take before
        port = str(self._store.port)
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
        told |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        told |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "no"}
        self._ranks = [
            Command(arguments, Path.cwd(), log, log, **{**env, **told, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(int(count))
        ]
        self.pid = self._ranks[0].pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        codes = [rank.poll() for rank in self._ranks]
        if any(codes):  # the others would wait for it
            for rank in self._ranks:
                rank.kill()
        self.returncode = None if None in codes else max(code or 0 for code in codes)
        return self.returncode

    def wait(self, timeout: float = 60) -> int | None:
        for rank in self._ranks:
            rank.wait(timeout)
        return self.poll()


def redirect(out: int, errors: int) -> None:
    """Make two open files this process's streams, and nothing its input, unless the first is a terminal."""
    os.dup2(out if os.isatty(out) else os.open(os.devnull, os.O_RDONLY), 0)
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
    os.setsid()  # before it opens a terminal, which is then its own
    redirect(*(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600) for path in (out, errors)))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for place in environment.get("PYTHONPATH", "").split(os.pathsep):  # as Python does when it starts
        if (first := Path(place, "sitecustomize.py")).is_file():
            runpy.run_path(str(first))
    import torch

    torch.set_num_threads(1)
    run_and_exit(arguments)
