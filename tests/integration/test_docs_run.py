"""Every command that a page shows is run, in the order in which a reader types it, and must end well.

A page is tried in a folder of its own, with tiny models behind the Hub ids that it names, data of the right shape
under the names of its files, and a Hub on this machine. What a page says ("with ``style`` in place") is in ``GIVEN``.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import typer
from hub_server import HubServer, connect, running_hub
from tiny import random_adapter
from tiny_registry import CHAT, TEXTS

from stackctl.cli import make_app

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(?P<language>sh|console|yaml|json)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)

SMOLLM2, QWEN3 = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-8B-Base"
ELSEWHERE = {
    "curl": "tests/integration/test_serve.py asks the same",
    "export": "the environment of the line that follows",
    "make": "what continuous integration runs, and `make setup` before it",
    "pip": "what `make setup` does",
    "hf": "a program of huggingface_hub's",
    "vllm": "benchmarks/vllm_client.py runs it",
    "llama-server": "benchmarks/llama_cpp_client.py runs the same server",
    "ollama": "in no package registry",
}
"""Programs that a page calls and this test does not run, and where they are run instead."""
NOT_HERE = {
    "stackctl eval base style+instruct --task arc_easy --limit 200": "its records are on the Hub: test_harness",
    "stackctl serve --engine llama.cpp": "the base of these pages is no GGUF file: test_llama_cpp",
    "stackctl serve --engine vllm": "vLLM has an environment of its own: test_serve_vllm",
}
"""Commands of ours that are not run here, and where they are."""

PAIRS = [json.loads(line) for line in (ROOT / "examples" / "taste.jsonl").read_text(encoding="utf-8").splitlines()]
"""What pages call ``taste.jsonl``."""
BEGIN = ["stackctl init", "stackctl base add smollm2"]
STYLE = [*BEGIN, "stackctl add style made/style"]
BOTH = [*STYLE, "stackctl add instruct made/instruct --on style"]
STORED = [*BOTH, "stackctl compose style+instruct --name storyteller"]
GIVEN: dict[str, list[str]] = {
    "docs/index.md": BEGIN,
    "docs/how-to/replace-instruct.md": [*BOTH, "stackctl add style made/other"],
    "docs/how-to/train-a-third.md": STORED,
    "docs/how-to/bring-checkpoints.md": ["stackctl init"],
    "docs/how-to/push-and-pull.md": STORED,
    "docs/how-to/many-gpus.md": STYLE,
    "docs/how-to/watch-a-run.md": BEGIN,
    "docs/how-to/see-what-an-adapter-is.md": [*STORED, "stackctl add style made/other"],
    "docs/how-to/compare-and-evaluate.md": [*STORED, "stackctl add instruct made/other --on style"],
    "docs/how-to/find-weights.md": BOTH,
    "docs/how-to/distil.md": STORED,
    "docs/how-to/subtract.md": [*STYLE, "stackctl add chat made/instruct"],
    "docs/how-to/serve.md": STORED,
    "docs/how-to/continuous-integration.md": STORED,
    "docs/reference/recipe.md": BEGIN,
}
"""What a page takes for granted."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """The fenced blocks of a page that are commands or files: (language, text)."""
    return [(m["language"], m["body"]) for m in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def commands(language: str, body: str) -> Iterator[list[str]]:
    """The words of each command of a block, up to a pipe or a redirection; a transcript marks them with ``$``."""
    if language == "console":
        body = "\n".join(line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ "))
    for line in body.replace("\\\n", " ").splitlines():
        if words := list(itertools.takewhile(lambda word: word not in ("|", ">"), shlex.split(line, comments=True))):
            yield words


RUN = [page for page in PAGES if any(language in ("sh", "console") for language, _ in blocks(page))]


@pytest.fixture(scope="module")
def made(models: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that somebody's scripts left: on each of the two bases."""
    root = tmp_path_factory.mktemp("made")
    llama, qwen = models("llama"), models("qwen3")
    wanted = {"style": llama, "instruct": llama, "other": llama, "qwen-style": qwen, "qwen-instruct": qwen}
    return {
        name: random_adapter(base, root / name, seed=seed, scale=0.05)
        for seed, (name, base) in enumerate(wanted.items())
    }


@pytest.fixture
def hub(models: Any, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub that has the models and the adapter of other people that the pages name."""
    monkeypatch.setattr("stackctl.engine.base.entry.embedded_gguf", lambda: None)  # smollm2 is then taken from the Hub
    with running_hub() as server:
        connect(server, tmp_path / "hf", monkeypatch)
        server.repo(SMOLLM2).commit(files_of(models("llama")))
        server.repo(QWEN3).commit(files_of(models("qwen3")))
        server.repo("somebody/some-lora").commit(files_of(made["style"]))
        several = {f"{name}/{file}": data for name in ("style", "other") for file, data in files_of(made[name]).items()}
        server.repo("somebody/many-loras").commit(several)
        yield server


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def lay_out(folder: Path, page: Path, made: dict[str, Path]) -> None:
    """The files that a reader of the page would have: data by its name, checkpoints, prompts."""
    places = {
        "made/style": "style",
        "made/instruct": "instruct",
        "made/other": "other",
        "output/checkpoint-531": "qwen-style",
        "output/stage1/checkpoint-531": "qwen-style",
        "output/stage2/instruct": "qwen-instruct",
    }
    for place, name in places.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(made[name], folder / place)
    for name in set(re.findall(r"[\w-]+\.(?:jsonl|json|txt)\b", page.read_text(encoding="utf-8"))):
        if name == "prompts.txt":
            (folder / name).write_text("How do I keep bread fresh?\nTell me about the sea.\n")
        elif name == "pirate.txt":
            (folder / name).write_text("Answer like a pirate.\n")
        elif name == "sharegpt.json":
            turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Well met."}]
            (folder / name).write_text(json.dumps([{"conversations": turns}] * 3))
        elif name.endswith(".jsonl"):
            kinds = {"style": TEXTS, "tone": TEXTS, "taste": PAIRS}
            oracle.write_jsonl(folder / name, kinds.get(re.split(r"\W", name)[0], CHAT)[:2])


def write_file(folder: Path, language: str, body: str) -> None:
    """A block that is a file: a recipe, or the configuration of an older script."""
    if language == "yaml" and "train:" in body:
        (folder / "stackctl.yaml").write_text(body)
    if language == "yaml" and "distributed_type:" in body:
        (folder / "fsdp.yaml").write_text(body)
    if language == "json" and "base_model_name" in body:
        (folder / "stage2.json").write_text(body)


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_runs(
    page: Path,
    run: Callable[..., Any],
    made: dict[str, Path],
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "stackctl.serving.http_server.run", lambda app, bound, ready: ready()
    )  # and it would serve on and on
    lay_out(tmp_path, page, made)
    for line in GIVEN.get(str(page.relative_to(ROOT)), []):
        run(*shlex.split(line)[1:])
    for language, body in blocks(page):
        if language not in ("sh", "console"):
            write_file(tmp_path, language, body)
            continue
        for words in commands(language, body):
            assert words[0] == "stackctl" or words[0] in ELSEWHERE, f"nobody runs {' '.join(words)}"
            if words[0] == "stackctl" and " ".join(words) not in NOT_HERE:
                run(*words[1:], *(["--port", 0] if words[1] == "serve" else []))
                tag_as_a_reader_would(hub)


def tag_as_a_reader_would(hub: HubServer) -> None:
    """Pages pull ``me/storyteller@v1``: whatever was pushed there carries that tag."""
    if repo := hub.repos.get("me/storyteller"):
        repo.refs["v1"] = repo.head


# -- the help ---------------------------------------------------------------------------------------------------------

HELP = ("push", "pull", "inspect", "compare", "eval", "ls", "verify", "compose", "use", "gc")
"""Commands whose examples are run one after the other, with two adapters and their stack in place."""


def test_the_examples_of_the_help_run(
    run: Callable[..., Any], made: dict[str, Path], hub: HubServer, tmp_path: Path
) -> None:
    commands: Any = typer.main.get_command(make_app()).commands  # type: ignore[attr-defined]
    lay_out(tmp_path, ROOT / "docs" / "reference" / "cli.md", made)
    (tmp_path / "backup" / "weights").mkdir(parents=True)
    for line in [*STORED, "stackctl add instruct made/other --on style", "stackctl add tone made/other"]:
        run(*shlex.split(line)[1:])
    seen = 0
    for name in HELP:
        for line in commands[name].epilog.splitlines():
            if line not in NOT_HERE:
                run(*shlex.split(line)[1:])
                tag_as_a_reader_would(hub)
                seen += 1
    assert seen > 20
