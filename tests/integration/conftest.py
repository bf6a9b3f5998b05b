"""What the engine's tests have besides: ``tiny_registry("qwen3")`` is a registry with that tiny base."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from checkpoints import make_base, make_registry, register
from hub_server import HubServer, connect, running_hub
from registry_fixtures import fails, filled_registry, four_adapters, project  # noqa: F401
from short_texts import texts

from stackctl.registry.store import Registry


@pytest.fixture(autouse=True)
def forget_targets() -> Callable[[], None]:
    """No test has what another's adapters stand on: it may have changed the libraries; one that does calls this."""

    def forget() -> None:
        if targets := sys.modules.get("stackctl.engine.training.targets"):
            targets._FOUND.clear()

    forget()
    return forget


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub on this machine, which huggingface_hub takes for the real one."""
    with running_hub() as server:
        connect(server, tmp_path / "hf", monkeypatch)
        yield server


@pytest.fixture
def here(tmp_path: Path) -> Registry:
    """A registry with style@1, and instruct@1 that was trained on it."""
    registry = make_registry(tmp_path / "registry")
    register(registry, "style", seed=1)
    register(registry, "instruct", ["style@1"], seed=2)
    return registry


@pytest.fixture
def other_registry(tmp_path: Path) -> Registry:
    """An empty registry of somebody else, whose base is the same model under another name."""
    return make_registry(tmp_path / "other" / "registry", make_base("llama"))


@pytest.fixture(scope="session")
def adapter(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint on the tiny Llama that PEFT wrote."""
    from tiny import random_adapter

    return random_adapter(models("llama"), tmp_path_factory.mktemp("adapter") / "style")


@pytest.fixture
def tiny_registry(run: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Make a registry in the working directory, with the tiny model of that name as its base."""
    from tiny_registry import TinyRegistry

    return lambda name="llama", **kind: TinyRegistry(run, models(name, **kind), tmp_path, monkeypatch)


@pytest.fixture
def h(tiny_registry: Any) -> Any:
    """Such a registry with the tiny Llama."""
    return tiny_registry()


@pytest.fixture
def style_and_instruct(h: Any) -> Any:
    """The same with a random adapter of each name."""
    h.add("style", seed=1)
    h.add("instruct", seed=2)
    return h


@pytest.fixture
def empty_token_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the test's own cache has tokens and references; nothing is there yet."""
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--num-processes`` forks its processes, each in one thread; test_two_processes_are_one_training launches."""
    import warm

    kept = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
    monkeypatch.setattr("stackctl.jobs.launch.subprocess", SimpleNamespace(Popen=warm.Launcher, **kept))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def style_and_noise(tiny_registry: Any) -> Any:
    """``style``, trained on texts like those that weights are learned from and judged by, and ``noise``, at random."""
    from tiny_registry import made_once

    h = tiny_registry("llama")

    def make() -> None:
        h.train("style", "--epochs", 12, "--learning-rate", 0.02, records=texts(0, 12))
        h.add("noise", seed=2, r=3)

    made_once(h.folder, h.base.with_name("pair-registry"), make)
    h.paths["noise"] = h.folder / "made" / "noise"
    return h


@pytest.fixture
def smollm2(smollm2_tokenizer: Any) -> Iterator[Any]:
    """The tokenizer, read once: a test may set its template, and takes a copy for anything else."""
    template = smollm2_tokenizer.chat_template
    yield smollm2_tokenizer
    smollm2_tokenizer.chat_template = template


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each optimizer step is given, in order."""
    from stackctl.engine.training.callbacks import StepCallback

    seen: list[dict[str, Any]] = []

    def watch(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        seen.append({name: p.grad.clone() for name, p in named if p.requires_grad})

    monkeypatch.setattr(StepCallback, "on_pre_optimizer_step", watch, raising=False)
    return seen
