"""``stackctl serve`` in a process of its own, which ends by itself when a test does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import warm

_START = 90


class Server:
    """A server that is ready: ``ready`` is its JSON line, ``errors`` the file that its stderr goes to."""

    def __init__(self, process: subprocess.Popen[str] | warm.Command, ready: dict[str, Any], errors: Path) -> None:
        self.process, self.ready, self.errors = process, ready, errors

    @property
    def url(self) -> str:
        return str(self.ready["url"])

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def client(self, key: str = "none") -> Any:
        from openai import OpenAI

        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def memory(self) -> int:
        """Bytes that the process holds."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


def installed(arguments: list[str], folder: Path, out: Path, errors: Path, **environment: str) -> subprocess.Popen[str]:
    """The command as a shell starts it."""
    with out.open("w") as output, errors.open("w") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "stackctl", *arguments],
            cwd=folder, stdout=output, stderr=said, text=True, env={**os.environ, **environment},
        )  # fmt: skip


@contextlib.contextmanager
def serving(folder: Path, *options: object, start: Callable[..., Any] = warm.Command) -> Iterator[Server]:
    """A server of the registry in a folder, on a free port."""
    out, errors = folder / "serve-stdout", folder / "serve-stderr"
    for old in (out, errors):  # of a server before this one
        old.unlink(missing_ok=True)
    arguments = ["serve", "--port", "0", "--json", *map(str, options)]
    process = start(arguments, folder, out, errors, OMP_NUM_THREADS="1")
    try:
        end, line = time.monotonic() + _START, ""
        while not line.endswith("\n") and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
            line = out.read_text() if out.exists() else ""
        assert line, f"no line within {_START} s: {errors.read_text()}"
        yield Server(process, json.loads(line), errors)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
