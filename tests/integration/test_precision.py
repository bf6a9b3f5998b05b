"""Training under bfloat16 autocast: only where it helps, with float32 weights, and nearly the same loss."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stackctl.engine import devices


def model_of(hidden: int, dtype: torch.dtype = torch.float32) -> Any:
    text = SimpleNamespace(hidden_size=hidden)
    return SimpleNamespace(dtype=dtype, config=SimpleNamespace(get_text_config=lambda: text))


@pytest.mark.parametrize(
    ("dtype", "device", "hidden", "weights", "hardware", "expected"),
    [
        ("auto", "cpu", 576, torch.float32, True, True),
        ("auto", "cpu", 576, torch.float32, False, False),
        ("auto", "cpu", 32, torch.float32, True, False),
        ("float32", "cpu", 576, torch.float32, True, False),
        ("auto", "cuda", 576, torch.float32, True, True),
        ("auto", "cuda", 576, torch.bfloat16, True, True),
        ("nf4", "cuda", 576, torch.bfloat16, True, True),
        ("auto", "cuda", 576, torch.bfloat16, False, False),
        ("auto", "cuda", 576, torch.float16, True, False),
        ("float32", "cuda", 576, torch.float32, True, False),
        ("auto", "mps", 576, torch.float32, True, False),
        ("auto", "cpu", 576, torch.bfloat16, True, False),
    ],
)
def test_autocast_is_chosen_only_where_it_helps(
    monkeypatch: pytest.MonkeyPatch, dtype: str, device: str, hidden: int, weights: torch.dtype, hardware: bool,
    expected: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: hardware)
    found = devices.computes_in_bfloat16(dtype, torch.device(device), model_of(hidden, weights))
    assert found is expected


def test_training_under_autocast_is_nearly_training_in_float32(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen and active all the same, the proofs pass, and what is saved is float32."""
    h.add("style", seed=1)
    plain = h.train("plain", "--max-steps", 3, on="style")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(devices, "_WIDE", 1)
    fast = h.train("fast", "--max-steps", 3, on="style")
    assert fast["loss"] == pytest.approx(plain["loss"], rel=0.02)
    assert fast["loss"] != plain["loss"]
    assert {t.dtype for t in load_file(h.weights("fast") / "adapter_model.safetensors").values()} == {torch.float32}
    run = h.registry.find_adapter("fast").newest().run
    assert "autocast" in run.dtype
