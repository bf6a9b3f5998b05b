"""One training in several processes, under ``accelerate launch``.

The command stays what its user sees: it checks the job, starts accelerate with workers that run the same job, shows
what rank 0 says, and returns the result as if it had trained itself. Rendezvous is on 127.0.0.1 and a free port.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from stackctl.core.errors import Failed, Interrupted, Terminated
from stackctl.jobs import ranks
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.launch_plan import Launch
from stackctl.machine.processes import on_signals
from stackctl.machine.resources import cores
from stackctl.render.output import Output, Result

_OWN_CONFIG = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",  # on CPUs as well: MULTI_CPU makes accelerate start a single process
    "num_machines": 1,
    "machine_rank": 0,
    "mixed_precision": "no",
    "gpu_ids": "all",
}
"""What accelerate is told when only ``--num-processes`` is given, whatever configuration lies in the home."""
_GRACE = 10.0
"""Seconds that accelerate gets to end after the run has a result."""


def launch_training(
    plan: Launch, prepared: PreparedJob, registry: Path, output: Output, progress: Callable[..., None]
) -> Result:
    """Train in several processes; returns what rank 0 would have printed.

    Raises:
        StackctlError: what the first of the processes that failed said.
        Interrupted, Terminated: Ctrl-C, SIGTERM; what was trained so far is saved.
    """
    with tempfile.TemporaryDirectory(prefix="stackctl-") as folder, _Workers() as workers:
        command = _command(plan, prepared, registry, Path(folder))
        link = {"processes": plan.processes, "again": plan.again, "cuts": msgspec.to_builtins(plan.cuts)}
        environment = {**os.environ, ranks.LINK: json.dumps({**workers.address, **link})}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // plan.processes)))
        log = Path(folder) / "log"
        with log.open("wb") as stream:
            launcher = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
            )
        try:
            result = _follow(workers, launcher, output, progress, log)
            with contextlib.suppress(subprocess.TimeoutExpired):
                launcher.wait(_GRACE)
            return result
        finally:
            workers.close()  # whoever is still there ends now
            _kill(launcher)


def _command(plan: Launch, prepared: PreparedJob, registry: Path, folder: Path) -> list[str]:
    job = {key: value for key, value in msgspec.to_builtins(prepared.job).items() if value is not None}
    job |= {"on": "+".join(prepared.trained_on) or None, "base": prepared.base.name}
    job |= {"data": prepared.data, "eval_data": prepared.eval_data, "name": prepared.name}
    path = folder / "job.json"
    path.write_text(json.dumps({key: value for key, value in job.items() if value is not None}), encoding="utf-8")
    config = plan.config or folder / "accelerate.json"
    if plan.config is None:
        config.write_text(json.dumps({**_OWN_CONFIG, "num_processes": plan.processes}), encoding="utf-8")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    accelerate += ["--num_processes", str(plan.processes), "--num_machines", "1"]
    accelerate += ["--main_process_ip", ranks.HOST, "--main_process_port", "0"]
    train = ["-m", "stackctl", "train", prepared.name, "--config", str(path), "--registry", str(registry)]
    return [*accelerate, *train, *(["--resume"] if plan.resume else [])]


class _Workers:
    """The socket that the workers are linked by, and what they say on it."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(16)
        self._listener = socket.create_server((ranks.HOST, 0))
        self.address = {"port": self._listener.getsockname()[1], "secret": self._secret}
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()
        self._lines: list[socket.socket] = []
        self._asked: str | None = None
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._read, args=(connection,), daemon=True).start()

    def _read(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError), connection.makefile("r", encoding="utf-8") as lines:
            if json.loads(next(lines, "{}")).get("secret") != self._secret:
                connection.close()
                return
            self._lines.append(connection)
            if self._asked:
                self.ask(self._asked)
            for line in lines:
                self.messages.put(json.loads(line))

    def ask(self, word: str) -> None:
        """Tell every worker to stop after its present step."""
        self._asked = word
        for connection in [*self._lines]:
            with contextlib.suppress(OSError):
                connection.sendall(f"{word}\n".encode())

    def close(self) -> None:
        """Hang up; a worker ends when nobody is on the line."""
        with contextlib.suppress(OSError):
            self._listener.close()
        for connection in [*self._lines]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _follow(
    workers: _Workers, launcher: subprocess.Popen[bytes], output: Output, progress: Callable[..., None], log: Path
) -> Result:
    """Show what rank 0 says until the run has a result or an error."""
    training = False
    with _signals() as signals:
        while True:
            if signals.again or (signals.word and not training):
                kind = Interrupted if signals.word == "interrupt" else Terminated
                hint = "run the command again, with --resume if it was begun"
                raise kind("interrupted before a step was finished", hint=hint)
            if signals.word and not signals.told:
                workers.ask(signals.word)
                signals.told = True
                output.note(ranks.ENDING)
            ended = launcher.poll() is not None
            try:
                message = workers.messages.get(timeout=0.1)
            except queue.Empty:
                if ended:
                    raise _died(launcher.returncode, log) from None
                continue
            if message["kind"] == "progress":
                training = True
                progress(message["step"], message["steps"], SimpleNamespace(**message["counters"]))
            elif message["kind"] in ("note", "status"):
                (output.note if message["kind"] == "note" else output.status)(message["text"])
            elif message["kind"] == "result":
                return Result(message["json"], message["brief"], message["screen"])
            elif message["kind"] == "error":
                raise ranks.error_from(message)


@contextlib.contextmanager
def _signals() -> Iterator[SimpleNamespace]:
    """Ctrl-C and SIGTERM as words; ``again`` when Ctrl-C came twice."""
    state = SimpleNamespace(word=None, told=False, again=False)

    def remember(number: int, _: object) -> None:
        state.again = state.again or state.word is not None
        state.word = state.word or ("interrupt" if number == signal.SIGINT else "terminate")

    with on_signals(remember):
        yield state


def _died(code: int, log: Path) -> Failed:
    """What can be said when the processes ended without a word: one was killed, or never began."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    killed = next((line for line in lines if "exitcode: -9" in line or "Signal 9" in line), None)
    if killed:
        return Failed(
            "a process of the run was killed (signal 9)",
            hint="look whether memory ran out; the same command with --resume goes on from the last save",
        )
    last = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
    return Failed(f"accelerate ended with {code}: {last}", hint="try the configuration with: accelerate test")


def _kill(launcher: subprocess.Popen[bytes]) -> None:
    """End what is left of the launcher's session."""
    with contextlib.suppress(OSError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
