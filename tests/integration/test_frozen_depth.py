"""Any depth of frozen adapters: folded where it is exact enough, and the error that is recorded is the true one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

NAMES = ("one", "two", "three", "four")


def rounding_error(base: Path, adapters: list[Path], dtype: torch.dtype) -> float:
    """‖what the weights gain - ΔW‖ / ‖ΔW‖ with ΔW summed in float64 and added once, over all modules."""
    weights = load_file(base / "model.safetensors")
    deltas: dict[str, torch.Tensor] = {}
    for path in adapters:
        factors = {key.removeprefix("base_model.model."): value.double() for key, value in load_file(path).items()}
        for key, a in factors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removesuffix(".lora_A.weight")
                delta = 8 / 4 * factors[f"{name}.lora_B.weight"] @ a
                deltas[name] = deltas.get(name, 0) + delta
    lost = total = 0.0
    for name, delta in deltas.items():
        before = weights[f"{name}.weight"].to(dtype)
        after = (before.double() + delta).to(dtype)
        lost += float((after.double() - before.double() - delta).square().sum())
        total += float(delta.square().sum())
    return (lost / total) ** 0.5


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_every_depth_trains_alike_folded_and_live(h: Any, depth: int) -> None:
    for seed, name in enumerate(NAMES[:depth], 1):
        h.add(name, seed=seed)
    on = "+".join(NAMES[:depth])
    adapters = [h.paths[name] / "adapter_model.safetensors" for name in NAMES[:depth]]
    folded = h.train("folded", "--max-steps", 2, "--dtype", "float32", on=on)
    assert folded["frozen"] == "fold"
    assert folded["frozen_error"] < 1e-5
    assert folded["frozen_error"] == pytest.approx(rounding_error(h.base, adapters, torch.float32), rel=0.2)
    live = h.train("live", "--max-steps", 2, "--dtype", "float32", "--frozen", "live", on=on)
    assert (live["frozen"], live["frozen_error"]) == ("live", None)
    assert live["loss"] == pytest.approx(folded["loss"], rel=1e-4)


def test_half_precision_is_kept_live_unless_folding_is_forced_and_then_tells_its_error(h: Any) -> None:
    for seed, name in enumerate(NAMES[:2], 1):
        h.add(name, seed=seed, scale=0.02)
    adapters = [h.paths[name] / "adapter_model.safetensors" for name in NAMES[:2]]
    wanted = rounding_error(h.base, adapters, torch.bfloat16)
    assert wanted > 1e-3
    chosen = h.train("chosen", "--max-steps", 1, "--dtype", "bfloat16", on="one+two")
    assert (chosen["frozen"], chosen["frozen_error"]) == ("live", None)
    forced = h.train("forced", "--max-steps", 1, "--dtype", "bfloat16", "--frozen", "fold", on="one+two")
    assert forced["frozen"] == "fold"
    assert forced["frozen_error"] == pytest.approx(wanted, rel=0.02)


def test_the_bare_base_has_nothing_to_lose(tiny_registry: Any) -> None:
    alone = tiny_registry().train("alone", "--max-steps", 1)
    assert (alone["on"], alone["frozen"], alone["frozen_error"]) == ([], "none", None)
