"""vLLM as the engine of ``serve``: its own server, whose models are expressions by our plug-in in its environment."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stackctl.core.errors import Failed, Incompatible, StackctlError
from stackctl.machine import processes
from stackctl.plan.lint import VLLM_DEFAULT_RANK, check_beside_base, vllm_max_rank
from stackctl.plan.stack_plan import StackPlan
from stackctl.serving.commands import vllm_base
from stackctl.serving.model_names import ModelNames
from stackctl.serving.vllm_plugin import REGISTRY

PROGRAM = "vllm"
_START_SECONDS = 1800
_LOOK_SECONDS = 0.5
_END_SECONDS = 120
_MOST = 128
"""The largest rank that room is made for when nothing asks for more: vLLM sets memory aside for it."""
_AT_ONCE = 4
"""Different stacks in one batch of vLLM."""


@dataclass(frozen=True)
class VllmOptions:
    """Where vLLM is to listen, who may ask, and the precision of the weights; ``port`` is a real one."""

    host: str
    port: int
    key: str | None = None
    dtype: str = "auto"


def check_vllm(plans: list[StackPlan]) -> str:
    """The command vLLM, if it is installed and takes these stacks.

    Raises:
        Incompatible: it is not, or with every reason.
    """
    for plan in plans:
        check_beside_base("vllm", plan)
    program = shutil.which(PROGRAM)
    if program is None:
        what = f"--engine vllm needs the program {PROGRAM}, which is not installed"
        raise Incompatible(what, hint="pip install vllm stackctl-lora, in an environment of their own; put it on PATH")
    return program


def vllm_line(program: str, models: ModelNames, plans: list[StackPlan], wanted: VllmOptions) -> list[str]:
    """The words that start vLLM with the base of a registry, and with room for the ranks of its stacks.

    Not under the name ``base``: that is left to the plug-in, as every other expression.
    """
    words, _ = vllm_base(models.base, models.registry.root)
    line = [program, "serve", *words, "--enable-lora", "--max-lora-rank", str(_rank(models, plans))]
    line += ["--max-loras", str(_AT_ONCE), "--served-model-name", models.base.name]
    if wanted.dtype != "auto":
        line = [*_without(line, "--dtype"), "--dtype", wanted.dtype]
    return [*line, "--host", wanted.host, "--port", str(wanted.port)]


def _without(line: list[str], option: str) -> list[str]:
    if option not in line:
        return line
    at = line.index(option)
    return line[:at] + line[at + 2 :]


def _rank(models: ModelNames, plans: list[StackPlan]) -> int:
    """Room for the sum of all adapters, as far as that is bearable, and for each stack that is stored or was named."""
    single, largest = 0, max((plan.rank for plan in plans), default=0)
    for row in models.listed():
        with contextlib.suppress(StackctlError):
            rank = models.find(row["id"])[1].rank
            single += rank if row["kind"] == "adapter" else 0
            largest = max(largest, rank)
    needed = max(largest, min(single, _MOST), VLLM_DEFAULT_RANK)
    return vllm_max_rank(needed) or vllm_max_rank(_MOST) or _MOST


def run_vllm(line: list[str], registry: Path, wanted: VllmOptions, ready: Callable[[], None]) -> None:
    """Run vLLM until SIGINT or SIGTERM; ``ready`` is called once it answers, and knows what an expression is.

    Raises:
        Failed: it ended by itself, or does not know of the plug-in.
    """
    environment = {**os.environ, REGISTRY: str(registry), "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    if wanted.key is not None:
        environment["VLLM_API_KEY"] = wanted.key  # a command line can be read by anybody
    asked_to_stop = False

    def stop(*_: object) -> None:
        nonlocal asked_to_stop
        asked_to_stop = True
        process.send_signal(signal.SIGINT)

    # Its log goes to stderr, for stdout has our one line; in a session of its own a Ctrl-C reaches it only through us.
    # Where we are killed it is asked to end, for it has processes of its own.
    bound = processes.bound(line, signal.SIGTERM)
    process = subprocess.Popen(bound, env=environment, stdout=2, start_new_session=True)
    with processes.on_signals(stop):
        try:
            if _is_up(process, wanted, lambda: asked_to_stop):
                _check_plugin(wanted)
                ready()
            code = process.wait()
        finally:
            processes.end(process, _END_SECONDS)
    if not asked_to_stop:
        raise Failed(f"vLLM ended with {code}", hint="what it wrote above says why")


def _is_up(process: subprocess.Popen[bytes], wanted: VllmOptions, given_up: Callable[[], bool]) -> bool:
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and not given_up():
        if time.monotonic() > until:
            raise Failed(f"vLLM is not up after {_START_SECONDS // 60} minutes")
        with contextlib.suppress(OSError, http.client.HTTPException):
            if _ask(wanted, "GET", "/health")[0] == 200:
                return True
        time.sleep(_LOOK_SECONDS)
    return False


def _check_plugin(wanted: VllmOptions) -> None:
    """Ask for a model that only the plug-in calls no expression, rather than unknown."""
    body = json.dumps({"model": "+", "prompt": "a", "max_tokens": 1})
    status, content = _ask(wanted, "POST", "/v1/completions", body)
    if status == 404:
        raise Failed(
            f"vLLM does not know what an expression is: {content[:200].decode(errors='replace')}",
            hint="install stackctl-lora in the environment that vllm is installed in",
        )


def _ask(wanted: VllmOptions, method: str, path: str, body: str | None = None) -> tuple[int, bytes]:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(wanted.host, wanted.host)
    connection = http.client.HTTPConnection(host, wanted.port, timeout=60)
    try:
        key = {"Authorization": f"Bearer {wanted.key}"} if wanted.key else {}
        connection.request(method, path, body, {"Content-Type": "application/json", **key})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
