"""AdamW with its state in 8 bits: near AdamW, goes on as it was, counted, and refused by name where it cannot be."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_registry import CHAT, interrupt

from stackctl.engine import devices
from stackctl.registry.run_folders import run_folder

WIDE = ("--rank", 128, "--alpha", 256)
"""So that factors have the 4,096 values from which states are quantised."""
EIGHT = ("--optimizer", "adamw-8bit")


def states(h: Any, name: str) -> list[dict[str, Any]]:
    save = run_folder(h.registry, name).checkpoints[-1]
    found = torch.load(save / "optimizer.pt", weights_only=True)["state"].values()
    return [{**state, **state.get("__bnb_optimizer_quant_state__", {})} for state in found]


def test_the_state_has_eight_bits_and_the_run_is_near_that_of_adamw(h: Any) -> None:
    whole = h.train("plain", *WIDE, "--max-steps", 4)
    eight = h.train("eight", *WIDE, *EIGHT, "--max-steps", 4)
    assert eight["loss"] == pytest.approx(whole["loss"], rel=0.02)
    assert eight["digest"] != whole["digest"]
    assert h.registry.find_adapter("eight").newest().settings["optimizer"] == "adamw-8bit"


def test_a_run_of_eight_bits_goes_on_as_it_was(h: Any) -> None:
    options = (*WIDE, *EIGHT, "--epochs", 4, "--save-steps", 1, "--batch-size", 3)
    whole = h.train("whole", *options)
    h.at_step(3, interrupt)
    h.train("new", *options, code=130)
    kinds = {state["state1"].dtype for state in states(h, "new")}
    assert torch.uint8 in kinds
    h.at_step(0, interrupt)
    assert "optimizer" in h.train("new", *WIDE, *options[6:], "--resume", code=2)["error"]["message"]
    assert h.train("new", *options, "--resume")["digest"] == whole["digest"]


def test_the_estimate_counts_what_is_kept(h: Any) -> None:
    """Against the bytes of the states that a run has saved."""
    options = (*WIDE, "--epochs", 2, "--save-steps", 1, "--batch-size", 3)
    for name, more in (("plain", ()), ("eight", EIGHT)):
        told = h.run("train", name, "--data", h.data(CHAT), *options, *more, "--dry-run", "--json").json["memory"]
        h.at_step(2, interrupt)
        h.train(name, *options, *more, code=130)
        kept = sum(
            value.numel() * value.element_size()
            for state in states(h, name)
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and key != "step" and not key.startswith("qmap")  # one for all
        )
        assert told["optimizer"] == kept


def test_what_needs_a_gpu_is_refused_before_anything_begins(tiny_registry: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("pages move here")
    h = tiny_registry()
    for more in ((), ("--dry-run",)):
        error = h.train("new", "--optimizer", "paged-adamw-8bit", *more, code=4)["error"]
        assert "cpu" in error["message"]
        assert "--optimizer adamw-8bit" in error["hint"]


def test_a_missing_kernel_is_refused_with_the_reason(tiny_registry: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for this")

    h = tiny_registry()
    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", missing)
    error = h.train("new", *EIGHT, code=4)["error"]
    assert "no kernel for this" in error["message"]
    monkeypatch.setattr(bitsandbytes.optim.AdamW, "step", lambda self: None)
    assert "did not do" in h.train("new", *EIGHT, code=4)["error"]["message"]
    devices.check_kernels("adamw")


def test_without_the_package_it_is_refused_by_name(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "bitsandbytes" else found(name, *more)
    )
    error = h.train("new", *EIGHT, code=4)["error"]
    assert "--optimizer adamw-8bit needs the package 'bitsandbytes'" in error["message"]
    assert "stackctl-lora[quant]" in error["hint"]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_kept_in_parts_it_is_refused(h: Any, tmp_path: Path, kind: str) -> None:
    config = tmp_path / "accelerate.yaml"
    config.write_text(f"distributed_type: {kind}\nnum_processes: 2\nfsdp_config: {{fsdp_version: 2}}\n")
    assert "8 bits" in h.train("new", *EIGHT, "--accelerate-config", config, code=2)["error"]["message"]
