"""Export of a stack as one adapter: beside copying the same bytes, and beside PEFT's own way."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.large_registry import large_registry
from benchmarks.timing import compare, parse_runs, run_command, run_stackctl, show, timed

_PEFT_WAY = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, first, second, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), first, adapter_name="a")
model.load_adapter(second, "b")
model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "ab", combination_type="cat")
model.save_pretrained(out, selected_adapters=["ab"])
"""


def main(options: Sequence[str] = ()) -> None:
    runs = parse_runs(options, "export", 3)
    with tempfile.TemporaryDirectory() as folder:
        _beside_copying(Path(folder), runs)
    with tempfile.TemporaryDirectory() as folder:
        _beside_peft(Path(folder), runs)


def _beside_copying(folder: Path, runs: int) -> None:
    """Two rank-64 adapters of an 8B model, 1.3 GB in float32."""
    registry = large_registry(folder, rank=64)
    sources = [folder / name / "adapter_model.safetensors" for name in ("style", "instruct")]
    out = folder / "out"

    def copy() -> None:
        out.mkdir()
        for source in sources:
            shutil.copyfile(source, out / source.parent.name)
            with (out / source.parent.name).open("rb+") as stream:
                os.fsync(stream.fileno())
        shutil.rmtree(out)

    def export() -> tuple[float, float]:
        command = ["export", "style+instruct", "--out", str(out), "--registry", str(registry)]
        found = run_command([sys.executable, "-m", "stackctl", *command])
        shutil.rmtree(out)
        return found

    show(
        compare({"copy and fsync the same bytes": timed(copy), "stackctl export (8B, 2 × rank 64)": export}, runs),
        "copy and fsync the same bytes",
    )


def _beside_peft(folder: Path, runs: int) -> None:
    """Two rank-16 adapters of SmolLM2."""
    registry, out = folder / "registry", folder / "out"
    run_stackctl(registry, "init")
    base: str = run_stackctl(registry, "base", "add", "smollm2")["path"]
    adapters = [folder / f"adapter-{seed}" for seed in (0, 1)]
    for seed, adapter in enumerate(adapters):
        random_adapter(base, adapter, seed)
        run_stackctl(registry, "add", adapter.name, adapter)

    def peft() -> tuple[float, float]:
        found = run_command([sys.executable, "-c", _PEFT_WAY, base, *map(str, adapters), str(out)])
        shutil.rmtree(out)
        return found

    def export() -> tuple[float, float]:
        command = ["export", "adapter-0+adapter-1", "--out", str(out), "--registry", str(registry)]
        found = run_command([sys.executable, "-m", "stackctl", *command])
        shutil.rmtree(out)
        return found

    show(
        compare(
            {"PEFT: load base, add_weighted_adapter(cat)": peft, "stackctl export (SmolLM2, 2 × rank 16)": export}, runs
        ),
        "PEFT: load base, add_weighted_adapter(cat)",
    )


def random_adapter(base: str, out: Path, seed: int) -> None:
    """A rank-16 adapter that changes the base a little."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=16, target_modules="all-linear"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.003)
    model.save_pretrained(out)
