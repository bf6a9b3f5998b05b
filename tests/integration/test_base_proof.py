"""A base is proved when it is added: its logits are those of transformers' own loading, and of a large one if asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers

from stackctl.engine.base import base_proof


@pytest.fixture(autouse=True)
def empty_token_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What other tests have proved is not known here."""
    monkeypatch.setenv("STACKCTL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", ["llama", "bfloat16", "gemma3", "qwen3_5"])
def test_a_base_is_proved_when_it_is_added(run: Callable[..., Any], models: Any, tmp_path: Path, kind: str) -> None:
    if kind in ("gemma3", "qwen3_5"):  # of which the class for text is taken, or all that sees
        folder = architectures.tiny_folder(kind, tmp_path / "model")
    else:
        folder = models("llama", dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    run("init")
    said = run("base", "add", "b", folder, "--json").json
    assert said["proved"]["transformers"] == transformers.__version__
    assert said["proved"]["difference"] <= 1e-6
    assert run("inspect", "b", "--json").json["proved"] == said["proved"]


def test_another_model_than_transformers_loads_is_refused(
    run: Callable[..., Any], models: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load = base_proof.load_weights

    def forgets_a_scale(*arguments: Any, **options: Any) -> Any:
        model = load(*arguments, **options)
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
        return model

    monkeypatch.setattr(base_proof, "load_weights", forgets_a_scale)
    run("init")
    refused = run("base", "add", "b", models("llama"), code=5)
    assert "are not those of transformers' own loading" in refused.err
    assert not list((tmp_path / "registry" / "bases").glob("*.yaml"))
    assert run("base", "add", "b", models("llama"), "--no-prove", "--json").json["proved"] is None


def test_it_is_done_once_and_not_for_large_weights(
    run: Callable[..., Any], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("init")
    with monkeypatch.context() as patched:
        patched.setattr(base_proof, "MOST_BYTES", 0)
        assert run("base", "add", "large", models("llama"), "--json").json["proved"] is None
        proved = run("base", "add", "asked", models("llama"), "--prove", "--json").json["proved"]
    monkeypatch.setattr(base_proof, "load_weights", None)
    assert proved == run("base", "add", "again", models("llama"), "--json").json["proved"]


def test_what_transformers_cannot_compute_by_itself_is_not_compared(
    run: Callable[..., Any], models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(*_: Any) -> Any:
        raise ValueError("pixel_values are missing")

    monkeypatch.setattr(base_proof, "_logits", raises)
    run("init")
    assert run("base", "add", "b", models("llama"), "--json").json["proved"] is None
