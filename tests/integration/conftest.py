"""What the engine's tests have besides: ``house("qwen3")`` is a registry with that tiny base."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from shelf import fails, shelf  # noqa: F401


@pytest.fixture
def house(run: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    from house import House

    return lambda name="llama", **kind: House(run, models(name, **kind), tmp_path, monkeypatch)
