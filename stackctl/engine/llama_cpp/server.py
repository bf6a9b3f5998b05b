"""llama.cpp's own server: in this process (the package xllamacpp), or the program llama-server. Both speak HTTP.

Fields of a request: tools/server/README.md of llama.cpp, "POST /completion".
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from stackctl.core.errors import Failed
from stackctl.machine import openmp, processes
from stackctl.machine.optional_packages import is_installed

PROGRAM = "llama-server"
_START_SECONDS = 600
_END_SECONDS = 30
_LOOK_SECONDS = 0.1
_ANSWER_SECONDS = 600
"""Longest wait for the next token, which is that for a long prompt."""


@dataclass(frozen=True)
class Settings:
    """The base as a file, tokens of ``context`` that all answers share, answers at once, and where it runs.

    ``exact``: the cache of keys and values in float32 rather than float16, for a base in float32.
    """

    gguf: Path
    context: int
    slots: int
    device: str = "auto"
    exact: bool = False


class Server:
    """llama.cpp with a base and adapters, which count nothing until a request says how often they do.

    Raises:
        Failed: it does not start.
    """

    def __init__(self, settings: Settings, adapters: Sequence[Path]) -> None:
        self._key = secrets.token_urlsafe()
        start = _in_process if is_installed("xllamacpp") else _as_program
        self._address, self.close = start(settings, adapters, self._key)

    def complete(self, body: dict[str, Any], wanted: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """What ``/completion`` streams, until it ends or is not wanted any more, which ends it in llama.cpp as well.

        Raises:
            Failed: llama.cpp refused it, or broke off.
        """
        connection = http.client.HTTPConnection(self._address, timeout=_ANSWER_SECONDS)
        try:
            headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
            connection.request("POST", "/completion", json.dumps({**body, "stream": True}), headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise Failed(f"llama.cpp answers {answer.status}: {_reason(answer.read())}")
            for line in answer:
                if line.startswith(b"data: "):
                    said = json.loads(line[6:])
                    if "error" in said:
                        raise Failed(f"llama.cpp broke off: {_reason(line[6:])}")
                    yield said
                    if said.get("stop"):
                        return
                elif line.startswith(b"error: "):
                    raise Failed(f"llama.cpp broke off: {_reason(line[7:])}")
                if not wanted():
                    return
            raise Failed("llama.cpp broke off in the middle of an answer")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Failed(f"llama.cpp does not answer: {error}") from error
        finally:
            connection.close()


def _reason(content: bytes) -> str:
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = json.loads(content)
        return str(said.get("error", said).get("message", said))[:300]
    return content.decode(errors="replace")[:300]


def _in_process(settings: Settings, adapters: Sequence[Path], key: str) -> tuple[str, Callable[[], None]]:
    with openmp.sleeping(os.environ):
        import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(settings.gguf)
    params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [key]
    params.ui, params.endpoint_slots, params.verbosity, params.warmup = False, False, -1, False
    params.n_ctx, params.n_parallel, params.kv_unified = settings.context, settings.slots, True
    # What it would keep of prompts besides is found again by their tokens alone, whichever adapters computed it.
    params.cache_ram_mib, params.cache_idle_slots = 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = openmp.computing_threads(os.environ)
    devices = {device["type"].name for device in xllamacpp.get_device_info()}
    if settings.device == "cpu" or devices <= {"GGML_BACKEND_DEVICE_TYPE_CPU"}:
        params.n_gpu_layers, params.fit_params = 0, False  # it would read the vocabulary twice to fit nothing
    if settings.exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
    try:
        held = [xllamacpp.Server(params)]
    except (RuntimeError, ValueError) as error:
        raise Failed(f"llama.cpp cannot load {settings.gguf.name}: {error}") from error

    def stop() -> None:
        atexit.unregister(stop)
        held.clear()

    atexit.register(stop)  # in the middle of an answer its threads would outlive what they use, and crash the process
    return urlsplit(held[0].listening_address).netloc, stop


def _as_program(settings: Settings, adapters: Sequence[Path], key: str) -> tuple[str, Callable[[], None]]:
    program = shutil.which(PROGRAM)
    if program is None:
        raise Failed(f"neither xllamacpp nor {PROGRAM} is there", hint="pip install 'stackctl-lora[llamacpp]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [program, "--model", str(settings.gguf), "--host", "127.0.0.1", "--port", str(port), "--no-slots"]
    line += ["--ctx-size", str(settings.context), "--parallel", str(settings.slots), "--kv-unified", "--no-warmup"]
    line += ["--cache-ram", "0", "--threads", str(openmp.computing_threads(os.environ)), "--lora-init-without-apply"]
    if settings.device == "cpu":
        line += ["--n-gpu-layers", "0"]
    if settings.exact:
        line += ["--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"]
    for path in adapters:
        line += ["--lora", str(path)]
    # What it says is read when it has ended.
    log = tempfile.TemporaryFile()  # noqa: SIM115
    environment = {**os.environ, "LLAMA_API_KEY": key}
    with openmp.sleeping(environment):
        process = subprocess.Popen(
            processes.bound(line), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
        )

    def stop() -> None:
        atexit.unregister(stop)
        processes.end(process, _END_SECONDS)
        log.close()

    atexit.register(stop)  # a command that is done ends without closing its engine

    try:
        _wait_for(process, port, log)
    except BaseException:
        stop()
        raise
    return f"127.0.0.1:{port}", stop


def _wait_for(process: subprocess.Popen[bytes], port: int, log: IO[bytes]) -> None:
    """Until it answers ``/health`` with 200.

    Raises:
        Failed: it ended, or does not get ready.
    """
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(_LOOK_SECONDS)
    log.seek(0)
    said = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    raise Failed(f"{PROGRAM} does not start: {said[-1][:300] if said else 'it says nothing'}")
