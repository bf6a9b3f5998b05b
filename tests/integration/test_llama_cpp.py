"""``--engine llama.cpp``: on a base in float32, where nothing is quantised, its greedy text is that of transformers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from serving import installed, serving
from tiny_gguf import write_tiny_gguf
from tiny_registry import TinyRegistry

from stackctl.engine.base.tokenizer import kept_reader
from stackctl.registry.base_models import converted_folder

TEXT = "Tell me of the sea."
STACKS = ["base", "style", "tone:0.5", "style+tone", "style:-1+tone@1:2"]
LLAMA = ("--engine", "llama.cpp")


@pytest.fixture
def filled_registry(run, tmp_path, monkeypatch):
    """A base from a GGUF file, with two adapters; ``base`` is the folder that it was converted to."""
    made = TinyRegistry(run, write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path, monkeypatch)
    made.base = converted_folder(tmp_path / "tiny.gguf")
    made.add("style", seed=1)
    made.add("tone", seed=2, r=3, use_rslora=True)
    run("compose", "style+tone", "--name", "both")
    return made


def answers(run, model, *options):
    return [json.loads(line) for line in run("generate", model, *options, "--json").out.splitlines()]


def same(run, model, *options):
    """The answers of both engines, which have to be equal."""
    wanted = answers(run, model, *options)
    found = answers(run, model, *options, *LLAMA)
    keys = ("stack", "prompt", "text", "prompt_tokens", "new_tokens", "stop")
    assert [{key: one[key] for key in keys} for one in found] == [{key: one[key] for key in keys} for one in wanted]
    return found


def test_generate_writes_the_text_of_transformers(filled_registry, run):
    texts = {same(run, model, "-p", TEXT, "--max-new-tokens", 24)[0]["text"] for model in STACKS}
    assert len(texts) == len(STACKS), "each stack has a text of its own, so that a wrong scale would show"
    three = ["-p", TEXT, "-p", "Hi.", "-p", TEXT * 3]
    same(run, "both", *three, "--max-new-tokens", 12, "--batch-size", 3)
    same(run, "both", "-p", TEXT, "--raw", "--max-new-tokens", 12, "--repetition-penalty", 1.3)
    text = answers(run, "style", "-p", TEXT, "--max-new-tokens", 24)[0]["text"]
    assert same(run, "style", "-p", TEXT, "--max-new-tokens", 24, "--stop", text[9:11])[0]["stop"] == "stop"
    drawn = ["-p", TEXT, "--max-new-tokens", 24, "--temperature", 2, "--seed", 3, *LLAMA]
    assert answers(run, "style", *drawn)[0]["text"] == answers(run, "style", *drawn)[0]["text"] != text


def test_weights_by_layer_and_other_methods_are_exported_as_they_are(filled_registry, run):
    entry = filled_registry.folder / "registry" / "stacks" / "both.yaml"
    layers = "weight: 1.0\n  layer_weights: {model.layers.0: 0.25}"
    entry.write_text(entry.read_text().replace("weight: 1.0", layers, 1))
    assert run("inspect", "both", "--json").json["members"][0]["layer_weights"] == {"model.layers.0": 0.25}
    layered = same(run, "both", "-p", TEXT, "--max-new-tokens", 24)[0]["text"]
    assert layered != answers(run, "style+tone", "-p", TEXT, "--max-new-tokens", 24)[0]["text"]
    run("compose", "style+tone", "--method", "knots_ties", "--name", "aligned")
    same(run, "aligned", "-p", TEXT, "--max-new-tokens", 24)
    run("compose", "style+tone", "--method", "ties", "--name", "trimmed")
    assert "not a pair of factors" in run("generate", "trimmed", "-p", TEXT, *LLAMA, code=4).err


def test_compare_and_the_cache(filled_registry, run):
    options = ["-p", TEXT, "--max-new-tokens", 12, "--json"]
    wanted = run("compare", "base", "style", "style:0.5+tone", *options).json["results"]
    found = run("compare", "base", "style", "style:0.5+tone", *options, *LLAMA).json["results"]
    assert [one["text"] for one in found] == [one["text"] for one in wanted]
    exports = sorted((Path(os.environ["XDG_CACHE_HOME"]) / "stackctl" / "adapters").glob("gguf-*"))
    known = {path: path.stat().st_ino for path in exports}
    answers(run, "style:-3+tone:0.1", "-p", TEXT, *LLAMA, "--max-new-tokens", 2)
    now = sorted((Path(os.environ["XDG_CACHE_HOME"]) / "stackctl" / "adapters").glob("gguf-*"))
    assert {path: path.stat().st_ino for path in now} == known, "other weights need no other files"
    assert sum("exported for an engine" in one["why"] for one in run("gc", "--cache", "--json").json["freed"]) >= 2
    same(run, "style", "-p", TEXT, "--max-new-tokens", 12)


def test_what_llama_cpp_cannot_do_is_refused_with_the_reason(filled_registry, run, fails, models, monkeypatch):
    prompt = ("-p", TEXT, *LLAMA)
    assert "--dtype" in fails("generate", "style", *prompt, "--dtype", "bfloat16", code=2)
    assert "--live" in fails("generate", "style", *prompt, "--live", code=2)
    assert "built for" in fails("generate", "style", *prompt, "--device", "mps", code=2)
    data = filled_registry.data()
    assert "transformers" in fails("compare", "base", "style", *prompt, "--data", data, code=2)
    run("base", "add", "plain", models("llama"))
    for command in (("generate", "base", "--base", "plain", *prompt), ("serve", "--base", "plain", *LLAMA)):
        assert "GGUF" in fails(*command, code=4)
    filled_registry.add("whole", seed=3, modules_to_save=["lm_head"])
    for command in (("generate", "whole", *prompt), ("compare", "base", "whole", *prompt), ("serve", "whole", *LLAMA)):
        assert "whole modules" in fails(*command, code=4)
    monkeypatch.setattr("stackctl.cli.engines.is_installed", lambda _: False)
    monkeypatch.setattr("stackctl.machine.optional_packages.is_installed", lambda name: name != "xllamacpp")
    assert "stackctl-lora[llamacpp]" in fails("generate", "style", *prompt, code=4)


def test_logits_that_are_no_numbers_are_no_answer_and_no_crash(filled_registry, run):
    line = [sys.executable, "-m", "stackctl", "generate", "style:1e30", "-p", TEXT, "--max-new-tokens", "200", *LLAMA]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 4 and "not a finite number" in done.stderr, (done.returncode, done.stderr)


def test_the_server_answers_stacks_with_their_own_texts(filled_registry, run):
    filled_registry.add("whole", seed=3, modules_to_save=["lm_head"])
    known = {name: answers(run, name, "-p", TEXT, "--max-new-tokens", 24)[0] for name in STACKS}
    with serving(filled_registry.folder, *LLAMA) as server:
        assert server.ready["engine"] == "llama.cpp" and server.ready["base"] == "tiny"
        client = server.client()

        def ask(model, **options):
            asked = [{"role": "user", "content": TEXT}]
            return client.chat.completions.create(model=model, messages=asked, max_tokens=24, **options)

        def streamed(model):
            chunks = list(ask(model, stream=True, stream_options={"include_usage": True}))
            return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices), chunks[-1].usage

        with ThreadPoolExecutor(10) as pool:
            found = list(pool.map(lambda name: (name, *streamed(name)), STACKS * 3))
        for name, text, usage in found:
            assert text == known[name]["text"], name
            assert usage.prompt_tokens == known[name]["prompt_tokens"]
            assert usage.completion_tokens == known[name]["new_tokens"]
        raw = answers(run, "style", "-p", TEXT, "--raw", "--max-new-tokens", 9)[0]["text"]
        assert client.completions.create(model="style", prompt=TEXT, max_tokens=9).choices[0].text == raw
        assert len({choice.message.content for choice in ask("style", n=3, temperature=3.0, seed=1).choices}) == 3
        with pytest.raises(openai.NotFoundError, match="did you mean 'style'"):
            ask("stile")
        with pytest.raises(openai.BadRequestError, match="whole modules"):
            ask("whole")
        with pytest.raises(openai.NotFoundError):
            ask("late")
        filled_registry.add("late", seed=9)
        assert ask("late+style").choices[0].message.content
        assert next(iter(ask("style", stream=True))), "who leaves in the middle of it ends it"
        assert ask("base").choices[0].message.content == known["base"]["text"]
        assert server.stop(signal.SIGTERM) == 0


_HEAVY = ("torch", "transformers", "peft", "numpy", "gguf", "datasets", "pyarrow", "huggingface_hub")
_LISTS = f"""
import atexit, sys
atexit.register(lambda: print("LOADED", *(m for m in {_HEAVY} if m in sys.modules), file=sys.stderr))
sys.argv[0] = "stackctl"
from stackctl.cli import main
main()
"""


def loads(folder, *arguments, asked=""):
    """What a command in a process of its own says, and what heavy libraries it loaded."""
    words = [str(word) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", _LISTS, *words], cwd=folder, input=asked, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said, _, loaded = done.stderr.rpartition("LOADED")
    return done.stdout, said, loaded.split()


def test_torch_and_transformers_are_loaded_once_for_each_adapter_and_then_no_more(filled_registry, run):
    ask = ("-p", TEXT, "--max-new-tokens", 12, *LLAMA)
    filled_registry.add("calm", seed=31)
    filled_registry.add("loud", seed=32)
    assert loads(filled_registry.folder, "generate", "base", *ask)[2] == [], "base add has kept what prompts need"
    _, said, loaded = loads(filled_registry.folder, "generate", "calm+loud", *ask)
    assert "torch" in loaded
    assert said.count("exporting calm@1 once for llama.cpp") == said.count("exporting loud@1 once for llama.cpp") == 1
    for model in ("calm+loud", "calm:-2+loud", "loud", "base"):
        text, said, loaded = loads(filled_registry.folder, "generate", model, *ask)
        assert (loaded, "exporting" in said) == ([], False)
        assert text.rstrip("\n") == answers(run, model, *ask[:4])[0]["text"].rstrip("\n")
    raw = ("generate", "calm", "--raw", "--json", "--seed", 1, "--temperature", 1, *LLAMA)
    assert loads(filled_registry.folder, *raw, asked=TEXT)[2] == []
    assert loads(filled_registry.folder, "compare", "base", "calm", *ask)[2] == []
    with serving(filled_registry.folder, "loud", *LLAMA, start=installed) as server:
        client = server.client()
        asked = [{"role": "user", "content": TEXT}]
        said = client.chat.completions.create(model="calm", messages=asked, max_tokens=12).choices[0].message.content
        assert said == answers(run, "calm", *ask[:4])[0]["text"]
        assert "libtorch" not in Path(f"/proc/{server.process.pid}/maps").read_text()


def test_what_was_kept_is_made_again_where_it_is_gone(filled_registry, run):
    ask = ("generate", "base", "-p", TEXT, "--max-new-tokens", 12)
    (filled_registry.base / "reader.json").unlink()
    text, said, loaded = loads(filled_registry.folder, *ask, *LLAMA)
    assert ("transformers" in loaded, said) == (True, "")
    assert loads(filled_registry.folder, *ask, *LLAMA) == (text, "", [])
    assert text.rstrip("\n") == answers(run, *ask[1:])[0]["text"].rstrip("\n")
    config = filled_registry.base / "tokenizer_config.json"
    config.write_text(config.read_text().replace("{", '{"split_special_tokens": true, ', 1))
    assert "transformers" in loads(filled_registry.folder, *ask, *LLAMA)[2]
    assert kept_reader(filled_registry.base) is None, "transformers reads it each time"


_PROGRAM = '''#!{python}
"""llama-server's options, and its server inside this process."""
import argparse, os, time
import xllamacpp

parser = argparse.ArgumentParser(allow_abbrev=False)
for name in ("--model", "--host", "--cache-type-k", "--cache-type-v", "--flash-attn"):
    parser.add_argument(name)
for name in ("--port", "--ctx-size", "--parallel", "--cache-ram", "--threads", "--n-gpu-layers"):
    parser.add_argument(name, type=int)
for name in ("--no-slots", "--kv-unified", "--no-warmup", "--lora-init-without-apply"):
    parser.add_argument(name, action="store_true")
parser.add_argument("--lora", action="append", default=[])
asked = parser.parse_args()
params = xllamacpp.CommonParams()
params.model.path, params.hostnames, params.port = asked.model, [asked.host], asked.port
params.api_keys, params.verbosity = [os.environ["LLAMA_API_KEY"]], -1
params.n_ctx, params.n_parallel, params.kv_unified = asked.ctx_size, asked.parallel, asked.kv_unified
params.cache_ram_mib, params.cpuparams.n_threads = asked.cache_ram, asked.threads
assert asked.cache_type_k == asked.cache_type_v == "f32" and asked.flash_attn == "off"
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in asked.lora]
server = xllamacpp.Server(params)
while True:
    time.sleep(1)
'''


def test_the_program_llama_server_is_used_where_the_package_is_missing(filled_registry, run, tmp_path, monkeypatch):
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(_PROGRAM.replace("{python}", sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    without = "import stackctl.engine.llama_cpp.server as server\nserver.is_installed = lambda _: False\n"
    ask = ["generate", "style", "-p", TEXT, "--max-new-tokens", "3", *LLAMA]
    told = subprocess.run(
        [sys.executable, "-c", without + _LISTS, *ask],
        cwd=filled_registry.folder,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert (told.returncode, bool(told.stdout.strip())) == (0, True), told.stderr
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(program) in line], "it ends with the command that started it"
    monkeypatch.setattr("stackctl.engine.llama_cpp.server.is_installed", lambda _: False)
    same(run, "style:0.5+tone", "-p", TEXT, "--max-new-tokens", 12)
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such device')\n")
    failed = run("generate", "style", "-p", TEXT, *LLAMA, code=1)
    assert "no such device" in failed.err


_WAITING = """#!{python}
import os, pathlib, time
pathlib.Path("{told}.new").write_text(str(os.getpid()))
pathlib.Path("{told}.new").rename("{told}")
time.sleep(600)
"""
"""Stands for a program that has started and does not end by itself."""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tell a program that who started it is gone")
@pytest.mark.parametrize(("engine", "name"), [("llama.cpp", "llama-server"), ("vllm", "vllm")])
def test_a_command_that_is_killed_leaves_no_server_behind(engine, name, filled_registry, tmp_path, monkeypatch):
    def wait_for(what):
        end = time.monotonic() + 60
        while not what() and time.monotonic() < end:
            time.sleep(0.05)
        assert what()

    told = tmp_path / "started"
    program = tmp_path / "bin" / name
    program.parent.mkdir()
    program.write_text(_WAITING.format(python=sys.executable, told=told))
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    line = "import stackctl.engine.llama_cpp.server as s, sys; s.is_installed = lambda _: False; "
    line += "sys.argv[0] = 'stackctl'; from stackctl.cli import main; main()"
    serve = [sys.executable, "-c", line, "serve", "style", "--port", "0", "--engine", engine]
    process = subprocess.Popen(serve, cwd=filled_registry.folder)
    wait_for(lambda: told.exists() or process.poll() is not None)
    server = psutil.Process(int(told.read_text()))
    assert str(program) in server.cmdline() and server.ppid() == process.pid
    process.kill()
    process.wait(30)
    try:
        wait_for(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.kill()


def test_logprobs_are_those_of_transformers_or_refused(filled_registry):
    """Of a character in several tokens llama.cpp tells the last alone; then the answer is refused, never guessed."""
    asked = {"logprobs": True, "top_logprobs": 4, "max_tokens": 24, "messages": [{"role": "user", "content": TEXT}]}

    def told(client, model, **options):
        return client.chat.completions.create(model=model, **asked, **options).choices[0].logprobs.content

    with serving(filled_registry.folder) as server:
        known = {name: told(server.client(), name) for name in STACKS}
    refused = 0
    with serving(filled_registry.folder, *LLAMA) as server:
        for name, wanted in known.items():
            found = client_error(told, server.client(), name)
            if isinstance(found, openai.BadRequestError):
                refused += 1
                assert found.param == "logprobs" and any(len(one.bytes) == 1 and one.bytes[0] > 127 for one in wanted)
                continue
            assert [one.bytes for one in found] == [one.bytes for one in wanted[: len(found)]]
            for one, other in zip(found, wanted, strict=False):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
                assert [x.bytes for x in one.top_logprobs] == [x.bytes for x in other.top_logprobs]
                assert [x.logprob for x in one.top_logprobs] == pytest.approx(
                    [x.logprob for x in other.top_logprobs], abs=1e-4
                )
        assert refused < len(known)
        plain = server.client().chat.completions.create(model="style", max_tokens=4, messages=asked["messages"])
        assert plain.choices[0].logprobs is None


def client_error(call, *arguments, **options):
    """What a call returns, or the error of a bad request."""
    try:
        return call(*arguments, **options)
    except openai.BadRequestError as error:
        return error
