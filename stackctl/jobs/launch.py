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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec

from stackctl.core.errors import Failed, Interrupted, StackctlError, Terminated, Usage
from stackctl.jobs import optimizers, ranks, teacher, trained_tokens
from stackctl.jobs.job import PreparedJob
from stackctl.jobs.micro_batches import StepCut
from stackctl.machine.resources import cores
from stackctl.render.output import Output, Result
from stackctl.storage.paths import typed_path
from stackctl.storage.yaml_files import convert, read_text
from stackctl.storage.yaml_text import parse_yaml

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


@dataclass(frozen=True)
class Launch:
    """How to launch: the number of processes, accelerate's configuration, whether it shards the model and
    whether it computes activations again; and how each process is to cut its steps."""

    processes: int
    config: Path | None
    sharded: bool = False
    checkpointing: bool = False
    cuts: tuple[StepCut, ...] = ()


NOT_WHOLE = Usage(
    "--orthogonal projects whole factors, and FSDP and DeepSpeed keep parts of them in each process",
    hint="use distributed_type: MULTI_GPU, or leave out --orthogonal",
)
"""What keeps the new adapter's rows from being projected in several processes."""


def plan_launch(prepared: PreparedJob) -> Launch | None:
    """How this job is to be launched; None when it is trained in this process.

    Under a launcher already it is trained here, as one of the run's processes.

    Raises:
        NotFound, Usage: the configuration is missing, is none of accelerate's, or contradicts the job.
    """
    job = prepared.job
    if ranks.is_worker() or (job.num_processes in (None, 1) and not job.accelerate_config):
        return None
    if ranks.is_launched():
        if job.num_processes and job.num_processes != ranks.world_size():
            raise Usage(
                f"--num-processes {job.num_processes}, but the launcher started {ranks.world_size()}",
                hint="leave out --num-processes where something else launches the processes",
            )
        return None
    if not job.accelerate_config:
        return Launch(job.num_processes or 1, None)
    path = typed_path(job.accelerate_config)
    parsed = parse_yaml(read_text(path), str(path))
    if not isinstance(parsed[0], dict) or "distributed_type" not in parsed[0]:
        raise Usage(f"{path} is no configuration of accelerate's", hint=f"accelerate config --config_file {path}")
    config = convert(parsed, _Config, str(path))
    _check_config(path, config)
    if job.orthogonal and config.distributed_type in ("FSDP", "DEEPSPEED"):
        raise NOT_WHOLE
    if config.distributed_type in ("FSDP", "DEEPSPEED") and prepared.teacher:
        raise teacher.NOT_WHOLE
    if config.distributed_type in ("FSDP", "DEEPSPEED") and prepared.trains_tokens:
        raise trained_tokens.NOT_WHOLE
    if config.distributed_type in ("FSDP", "DEEPSPEED") and job.optimizer in optimizers.EIGHT_BITS:
        raise optimizers.NOT_WHOLE
    processes = job.num_processes or config.num_processes or 1
    sharded = config.distributed_type == "FSDP"
    checkpointing = sharded and config.fsdp_config is not None and config.fsdp_config.fsdp_activation_checkpointing
    return Launch(processes, path.resolve(), sharded, bool(checkpointing)) if processes > 1 else None


class _Fsdp(msgspec.Struct):
    fsdp_version: int | None = None
    fsdp_activation_checkpointing: bool | None = None


class _DeepSpeed(msgspec.Struct):
    zero_stage: int | None = None


class _Config(msgspec.Struct):
    """What of a configuration of accelerate's is looked at here; there is much more in it."""

    distributed_type: str
    num_processes: Annotated[int, msgspec.Meta(ge=1, le=65536)] | None = None
    num_machines: int | None = None
    fsdp_config: _Fsdp | None = None
    deepspeed_config: _DeepSpeed | None = None


def _check_config(path: Path, config: _Config) -> None:
    if (config.num_machines or 1) > 1:
        raise Usage(
            f"{path} is for several machines, and this command launches on one",
            hint=f"on each machine: accelerate launch --config_file {path} -m stackctl train …",
        )
    fsdp, deepspeed = config.fsdp_config or _Fsdp(), config.deepspeed_config or _DeepSpeed()
    if config.distributed_type == "FSDP" and (fsdp.fsdp_version or 1) != 2:
        raise Usage(f"{path}: FSDP of version 1 cannot shard a frozen base", hint="set fsdp_version: 2 in fsdp_config")
    if config.distributed_type == "DEEPSPEED" and (deepspeed.zero_stage or 0) > 2:
        raise Usage(f"{path}: a base sharded by ZeRO 3 cannot be proved", hint="use zero_stage: 2, or FSDP")


def launch_training(
    plan: Launch,
    prepared: PreparedJob,
    registry: Path,
    output: Output,
    progress: Callable[..., None],
    *,
    resume: bool,
    again: str,
) -> Result:
    """Train in several processes; returns what rank 0 would have printed.

    ``again`` is the command that goes on after an interruption.

    Raises:
        StackctlError: what the first of the processes that failed said.
        Interrupted, Terminated: Ctrl-C, SIGTERM; what was trained so far is saved.
    """
    with tempfile.TemporaryDirectory(prefix="stackctl-") as folder, _Workers() as workers:
        command = _command(plan, prepared, registry, Path(folder), resume=resume)
        environment = {
            **os.environ,
            ranks.LINK: json.dumps(
                {**workers.address, "processes": plan.processes, "again": again, "cuts": msgspec.to_builtins(plan.cuts)}
            ),
        }
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


def _command(plan: Launch, prepared: PreparedJob, registry: Path, folder: Path, *, resume: bool) -> list[str]:
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
    return [*accelerate, *train, *(["--resume"] if resume else [])]


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
                raise _stopped(signals.word)
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

    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, remember)
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stopped(word: str) -> StackctlError:
    kind = Interrupted if word == "interrupt" else Terminated
    return kind("interrupted before a step was finished", hint="run the command again, with --resume if it was begun")


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
