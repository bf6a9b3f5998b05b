"""``stackctl serve`` in a process of its own, which ends by itself when a test does."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_START = 90


class Server:
    """A server that is ready: ``ready`` is its JSON line, ``errors`` the file that its stderr goes to."""

    def __init__(self, process: subprocess.Popen[str], ready: dict[str, Any], errors: Path) -> None:
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


@contextlib.contextmanager
def serving(folder: Path, *options: object) -> Iterator[Server]:
    """A server of the registry in a folder, on a free port."""
    errors = folder / "serve-stderr"
    with errors.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "stackctl", "serve", "--port", "0", "--json", *map(str, options)],
            cwd=folder, stdout=subprocess.PIPE, stderr=stream, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], _START)
        line = process.stdout.readline() if readable else ""
        assert line, f"no line within {_START} s: {errors.read_text()}"
        yield Server(process, json.loads(line), errors)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(30)
