"""vLLM as an engine: our resolver against vLLM's interface, and ``serve`` against a program that stands for vLLM.

The real vLLM needs gigabytes of its own; ``python -m benchmarks.vllm_expressions`` runs it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
import sys
import tomllib
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import oracle
import pytest
from safetensors.torch import load_file

from stackctl.serving.vllm_plugin import max_rank


class HTTPException(Exception):
    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


@dataclass
class LoRARequest:
    lora_name: str
    lora_int_id: int
    lora_path: str


class LoRAResolver:
    pass


class Resolvers(dict):
    def register_resolver(self, name, resolver):
        self[name] = resolver


@pytest.fixture
def filled_registry(tiny_registry):
    made = tiny_registry("llama")
    made.add("style", seed=1)
    made.add("tone", seed=2, r=3, use_rslora=True)
    return made


@pytest.fixture
def resolve(filled_registry, monkeypatch):
    """What vLLM calls, by the entry point that it finds."""
    resolvers = Resolvers()
    parts = {
        "vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": resolvers},
        "fastapi": {"HTTPException": HTTPException},
    }  # fmt: skip
    for name, content in parts.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sys, "argv", ["vllm", "serve", str(filled_registry.base), "--max-lora-rank", "8"])
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    point = EntryPoint("stackctl", project["entry-points"]["vllm.general_plugins"]["stackctl"], "vllm.general_plugins")
    point.load()()
    assert not resolvers, "without STACKCTL_REGISTRY it does nothing"
    monkeypatch.setenv("STACKCTL_REGISTRY", str(filled_registry.folder))
    point.load()()

    def ask(name, base=None):
        return asyncio.run(resolvers["stackctl"].resolve_lora(str(base or filled_registry.base), name))

    def refused(status, name, base=None):
        with pytest.raises(HTTPException) as caught:
            ask(name, base)
        assert caught.value.status_code == status
        return caught.value.detail

    return types.SimpleNamespace(ask=ask, refused=refused)


def test_an_unknown_model_is_an_expression_exported_exactly(filled_registry, resolve):
    found = resolve.ask("style:0.5+tone:-2")
    assert found.lora_name == "style:0.5+tone:-2" and found.lora_int_id == 1
    stacked = oracle.logits(oracle.live(filled_registry.base, (Path(found.lora_path), 1.0)))
    wanted = filled_registry.live(("style", 0.5), ("tone", -2.0))
    assert oracle.relative(stacked, wanted, filled_registry.live()) < 1e-5
    assert resolve.ask("style@1:0.5+tone:-2").lora_path == found.lora_path, "one export for one digest"
    assert resolve.ask("style").lora_path != found.lora_path
    filled_registry.add("late", seed=9)
    assert resolve.ask("late").lora_path, "what is registered while it runs works at once"


def test_the_base_alone_is_an_adapter_of_zeros(filled_registry, resolve):
    folder = Path(resolve.ask("base").lora_path)
    assert all(not tensor.any() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert (
        oracle.relative(
            oracle.logits(oracle.live(filled_registry.base, (folder, 1.0))),
            filled_registry.live(),
            0 * filled_registry.live(),
        )
        == 0
    )
    assert resolve.ask("style:0").lora_path


def test_what_vllm_cannot_serve_is_refused_with_the_reason(filled_registry, resolve, run, models):
    assert "did you mean 'style'" in resolve.refused(404, "stile")
    assert "not an expression" in resolve.refused(400, "+")
    filled_registry.add("wide", seed=3, r=9)
    assert "has rank 9" in resolve.refused(400, "wide") and "at most 8" in resolve.refused(400, "wide")
    filled_registry.add("whole", seed=5, modules_to_save=["lm_head"])
    assert "whole modules" in resolve.refused(400, "whole")
    run("compose", "style+tone", "--method", "ties", "--name", "trimmed")
    assert "not a pair of factors" in resolve.refused(400, "trimmed")
    other = models("llama", seed=7)
    assert "not a base of the registry" in resolve.refused(400, "style", other)
    run("base", "add", "other", other)
    assert "has the base 'tiny', and this server runs 'other'" in resolve.refused(400, "style", other)
    weights = filled_registry.weights("tone") / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert "tone@1" in resolve.refused(400, "tone:0.3")
    assert resolve.ask("style").lora_path


@pytest.mark.parametrize(
    ("line", "rank"),
    [("vllm serve x", 16), ("vllm serve x --max-lora-rank 64", 64), ("x --max_lora_rank=8 --max-loras 2", 8)],
)
def test_the_largest_rank_is_that_of_the_command_line(line, rank):
    assert max_rank(line.split()) == rank


_PROGRAM = '''#!{python}
"""Stands for vLLM: it says what it was started with, and answers as it does."""
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def answer(self, status):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"{}")
    def do_GET(self):
        self.answer(200 if self.path == "/health" else 404)
    def do_POST(self):
        known = os.environ["VLLM_API_KEY"] in self.headers["Authorization"]
        self.answer({status} if known and self.path == "/v1/completions" else 401)

names = ("STACKCTL_REGISTRY", "VLLM_ALLOW_RUNTIME_LORA_UPDATING")
print(json.dumps([sys.argv[1:], {name: os.environ[name] for name in names}]), flush=True)
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
'''


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Puts that program on the path; ``status`` is what it answers to a name that is no expression."""

    def make(status):
        program = tmp_path / "bin" / "vllm"
        program.parent.mkdir(exist_ok=True)
        program.write_text(_PROGRAM.replace("{python}", sys.executable).replace("{status}", str(status)))
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return make


def test_serve_starts_vllm_and_says_when_it_answers(filled_registry, run, fails, vllm):
    assert "vllm" in fails("serve", "--engine", "vllm", code=4)
    vllm(400)
    command = [sys.executable, "-m", "stackctl", "serve", "--engine", "vllm", "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--api-key", "secret", "--dtype", "bfloat16"], cwd=filled_registry.folder, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready = json.loads(process.stdout.readline())
    assert (ready["engine"], ready["base"]) == ("vllm", "tiny") and {"base", "style", "tone"} <= set(ready["models"])
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 0
    (line,) = [line for line in said.splitlines() if line.startswith("[[")]
    words, environment = json.loads(line)
    assert words[:2] == ["serve", str(filled_registry.base)] and "--enable-lora" in words and "secret" not in words
    assert words[words.index("--max-lora-rank") + 1] == "16" and words[words.index("--dtype") + 1] == "bfloat16"
    assert words.count("--dtype") == 1 and f"http://127.0.0.1:{words[words.index('--port') + 1]}" == ready["url"]
    assert environment["STACKCTL_REGISTRY"] == str(filled_registry.folder / "registry")
    filled_registry.add("whole", seed=5, modules_to_save=["lm_head"])
    assert "whole modules" in fails("serve", "whole", "--engine", "vllm", code=4)
    assert "--device" in fails("serve", "--engine", "vllm", "--device", "cpu", code=2)


def test_a_vllm_without_the_plug_in_is_said(filled_registry, vllm):
    vllm(404)
    command = [sys.executable, "-m", "stackctl", "serve", "--engine", "vllm", "--port", "0", "--api-key", "secret"]
    ended = subprocess.run(command, cwd=filled_registry.folder, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 1 and "install stackctl-lora in the environment" in ended.stderr
