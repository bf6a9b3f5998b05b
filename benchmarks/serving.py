"""Load on ``stackctl serve``: 1, 4, 16 and 64 clients with 1 and with 8 stacks, beside transformers' and llama.cpp's.

    pip install --target peers fastapi        # for transformers' own server; left out of the table where it is missing
    PYTHONPATH=peers python -m benchmarks serving

All serve SmolLM2. transformers' server knows no stacks: it answers from the folder of one exported model, with and
without its continuous batching. llama.cpp runs the base's four-bit GGUF through ``stackctl serve --engine llama.cpp``.
Every client asks once, greedily, for the same number of tokens, streamed; all begin together. Reported are requests and
tokens a second and the median seconds to the first token, each as a ratio to stackctl's embedded engine with as many
clients and stacks.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import random_adapter

from benchmarks.timing import run_stackctl

_STACKS = ("a+b", "a", "b", "a:0.5+b", "a+b:0.5", "a:0.3", "b:0.7", "base")
_START = 120
_OURS = "stackctl serve"


@dataclass(frozen=True)
class Load:
    """What one burst of clients got: requests and tokens a second, median seconds to the first token."""

    requests: float
    tokens: float
    first: float


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks serving")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=24, help="tokens of each answer (24)")
    given = parser.parse_args(options)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merged = _prepare(folder)
        found: dict[tuple[str, int, int], Load] = {}
        for server, command, models in _servers(folder, merged):
            with running_server(command, folder) as url:
                for stacks in (1, 8):
                    if names := models[:stacks] if len(models) >= stacks else ():
                        burst(url, names, len(names), 2)  # each stack once, so that none is loaded while timed
                        for clients in given.clients:
                            found[server, clients, stacks] = burst(url, names, clients, given.tokens)
        _show(found)


def _prepare(folder: Path) -> Path:
    """A registry with SmolLM2 and two random adapters; the folder of their exported sum."""
    run_stackctl(folder, "init")
    base = Path(run_stackctl(folder, "base", "add", "smollm2")["path"])
    for seed, name in enumerate("ab"):
        random_adapter(base, folder / "made" / name, seed=seed, r=16, scale=0.02)
        run_stackctl(folder, "add", name, folder / "made" / name)
    run_stackctl(folder, "export", "a+b", "--format", "model", "--out", folder / "merged")
    return folder / "merged"


def _servers(folder: Path, merged: Path) -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    """The name of each server that can run here, its command but for the port, and the models that it knows."""
    ours = [sys.executable, "-m", "stackctl", "serve", "-q"]
    yield _OURS, ours, _STACKS
    if importlib.util.find_spec("xllamacpp"):
        yield "stackctl serve --engine llama.cpp, Q4", [*ours, "--engine", "llama.cpp"], _STACKS
    if importlib.util.find_spec("fastapi"):
        theirs = [str(Path(sys.executable).with_name("transformers")), "serve", str(merged), "--device", "cpu"]
        yield "transformers serve", theirs, (str(merged),)
        yield "transformers serve, continuous batching", [*theirs, "--continuous-batching"], (str(merged),)


@contextlib.contextmanager
def running_server(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The server on a free port of this machine, once it answers; it is stopped in the end."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with (folder / "server.log").open("w") as log:
        where = ["--host", "127.0.0.1", "--port", str(port)]
        process = subprocess.Popen(
            [*command, *where], cwd=folder, stdout=log, stderr=log, env={**os.environ, **(environment or {})}
        )
    try:
        deadline = time.monotonic() + _START
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit((folder / "server.log").read_text()[-3000:])
            time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _answers(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=2).status == 200)
    except (urllib.error.URLError, OSError):
        return False


def burst(url: str, models: Sequence[str], clients: int, tokens: int) -> Load:
    with ThreadPoolExecutor(clients) as pool:
        started = time.perf_counter()
        answers = list(pool.map(lambda n: _ask(url, models[n % len(models)], n, tokens), range(clients)))
        seconds = time.perf_counter() - started
    made = sum(count for _, count in answers)
    return Load(clients / seconds, made / seconds, statistics.median(first for first, _ in answers))


def _ask(url: str, model: str, number: int, tokens: int) -> tuple[float, int]:
    """Seconds to the first token of one streamed answer, and how many pieces came."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"Tell me a long story about the number {number} and the sea."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    started, first, count = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request, timeout=600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices") or [{}]
            if (choices[0].get("delta") or {}).get("content"):
                first = first or time.perf_counter() - started
                count += 1
    return first, count


def _show(found: dict[tuple[str, int, int], Load]) -> None:
    print(f"{'':42}{'clients':>8}{'stacks':>8}{'requests/s':>12}{'tokens/s':>10}{'first token':>13}")
    for (server, clients, stacks), load in found.items():
        own = found[_OURS, clients, stacks]
        row = f"{server:42}{clients:8}{stacks:8}"
        if server == _OURS:
            print(f"{row}{load.requests:12.2f}{load.tokens:10.1f}{load.first:11.2f} s")
        else:
            print(
                f"{row}{load.requests / own.requests:10.2f} x{load.tokens / own.tokens:8.2f} x"
                f"{load.first / own.first:11.2f} x"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
