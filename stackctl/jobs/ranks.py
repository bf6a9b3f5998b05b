"""Which process of a distributed run this one is, and how it talks to the command that launched it.

``stackctl train --num-processes 2`` is one command for its user: it alone prints, and takes Ctrl-C. The processes that
train are workers. Each is linked to the command by a socket on 127.0.0.1, on which it says what it has to say, one JSON
document a line, and hears when to stop. When the command is gone, however it ended, its workers are gone as well.

Under somebody else's launcher (``accelerate launch -m stackctl train …``, torchrun) there is no such command: then the
process of rank 0 prints, as the command would.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from typing import Any

from stackctl.core import errors
from stackctl.core.errors import Failed, StackctlError
from stackctl.jobs.micro_batches import StepCut
from stackctl.render.output import Output, Result
from stackctl.render.terminal import counted

LINK = "STACKCTL_LINK"
"""In a worker's environment: the port and the secret of the command that launched it, the number of processes that it
asked for, how steps are to be cut, and the command that goes on after an interruption; as JSON."""
HOST = "127.0.0.1"


ENDING = "it ends after this step and is saved; a second Ctrl-C ends it at once, without saving"
"""What is said when a run is asked to stop."""


def rank() -> int:
    """This process among those of the run: 0 unless a launcher says otherwise."""
    return int(os.environ["RANK"]) if is_launched() else 0


def local_rank() -> int:
    """This process among those of the run on this machine."""
    return int(os.environ["LOCAL_RANK"]) if is_launched() else 0


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def is_launched() -> bool:
    """Whether torch's launcher started this process as one of a run."""
    return all(os.environ.get(name, "").isdecimal() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def is_worker() -> bool:
    """Whether a ``stackctl train`` launched this process, which must not launch again."""
    return LINK in os.environ


class Link:
    """A worker's line to the command that launched it."""

    def __init__(self, text: str) -> None:
        import socket

        told = json.loads(text)
        self.processes: int = told["processes"]
        self.again: str = told["again"]
        self.cuts = [StepCut(**cut) for cut in told["cuts"]]
        """How steps are to be cut, and in what other ways they could be, each needing less than the one before."""
        self.stop: str | None = None
        """``interrupt`` or ``terminate`` once the command asked for an end after the present step."""
        self._lock = threading.Lock()
        try:
            self._socket = socket.create_connection((HOST, told["port"]), timeout=30)
        except OSError:
            os._exit(Failed.exit_code)  # the command is gone, and with it whoever could be told
        self._socket.settimeout(None)
        self.send("hello", secret=told["secret"])
        threading.Thread(target=self._listen, daemon=True).start()

    def send(self, kind: str, **values: Any) -> None:
        """Say something; ``kind`` is hello, note, status, progress, result or error."""
        line = json.dumps({"kind": kind, "rank": rank(), **values}) + "\n"
        with self._lock, contextlib.suppress(OSError):
            self._socket.sendall(line.encode())

    def _listen(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile("r", encoding="utf-8") as lines:
            for line in lines:
                self.stop = line.strip()
        os._exit(Failed.exit_code)  # at once, as a kill would end a run of one process


class LinkedOutput(Output):
    """The output of a worker: everything goes to the command, which prints it; only rank 0 speaks unasked."""

    def __init__(self, link: Link, **modes: bool) -> None:
        super().__init__(**modes)
        self._link = link

    def emit(self, result: Result) -> None:
        if rank() == 0:
            screen = result.screen if isinstance(result.screen, str) else ""
            self._link.send("result", json=result.json, brief=result.brief, screen=screen)

    def note(self, text: str) -> None:
        if rank() == 0:
            self._link.send("note", text=text)

    def status(self, text: str) -> None:
        if rank() == 0:
            self._link.send("status", text=text)

    def error(self, error: StackctlError) -> None:
        self._link.send("error", type=type(error).__name__, message=error.message, hint=error.hint)


class OtherRankOutput(Output):
    """The output of a rank above 0 under somebody else's launcher: only what went wrong here, and not everywhere."""

    def emit(self, result: Result) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def error(self, error: StackctlError) -> None:
        if _is_first_to_fail():
            self.json_mode = False
            super().error(type(error)(f"process {rank()}: {error.message}", hint=error.hint))


def _is_first_to_fail() -> bool:
    """Whether no other rank has failed before. Before the ranks are joined all of them fail alike, and rank 0 tells."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_initialized():
        return False
    try:
        store = distributed.distributed_c10d._get_default_store()
        return bool(store.add("stackctl_failed", 1) == 1)
    except Exception:  # rank 0 keeps the store, and is gone: it told
        return False


_link: Link | None = None


def link() -> Link | None:
    """The line to the command that launched this process, opened when first asked for."""
    global _link
    if _link is None and is_worker():
        _link = Link(os.environ[LINK])
    return _link


def make_output(*, json_mode: bool = False, quiet: bool = False) -> Output:
    """The output that this process has: a command's own, or that of one among several."""
    if linked := link():
        return LinkedOutput(linked, json_mode=json_mode, quiet=quiet)
    if rank() > 0:
        return OtherRankOutput(json_mode=json_mode, quiet=quiet)
    return Output(json_mode=json_mode, quiet=quiet)


def check_number() -> None:
    """The launcher started as many processes as the command asked for.

    Raises:
        Failed: it did not; some configurations silently make one process of many.
    """
    linked = link()
    if linked and linked.processes != world_size():
        raise Failed(
            f"accelerate started {counted(world_size(), 'process', 'processes')} instead of {linked.processes}",
            hint="set distributed_type: MULTI_GPU, FSDP or DEEPSPEED in the configuration, on CPUs as well",
        )


def error_from(message: dict[str, Any]) -> StackctlError:
    """The error that a worker told of, as an error of the same class here."""
    kind = getattr(errors, str(message["type"]), StackctlError)
    error: StackctlError = kind(message["message"], hint=message["hint"])
    return error
