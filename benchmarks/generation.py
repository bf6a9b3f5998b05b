"""Generation: tokens a second, peak memory and start-up beside transformers alone and plain PEFT with live adapters."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.export import random_adapter
from benchmarks.timing import compare, parse_runs, run_command, show
from stackctl.registry.base_entries import resolve_base
from stackctl.registry.planning import read_plan
from stackctl.registry.resolve import resolve_expression

_DEPTHS = (1, 2, 4)
_TOKENS = 48
_PROMPT = "Once upon a time, in a small village by the sea,"
_BARE = "transformers, the bare base"
_PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
base, prompt, *adapters = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
if adapters:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, f"a{number}")
    model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
ids = tokenizer(prompt, return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""
"""What one writes by hand; it ends at the first token."""


def main(options: Sequence[str] = ()) -> None:
    runs = parse_runs(options, "generation", 5)
    from stackctl.engine.models import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = prepare(folder)
        _speed(folder, base, runs)
        _start(folder, base, max(1, runs // 2))


def prepare(folder: Path) -> str:
    """A registry with SmolLM2 and four rank-16 adapters that change it a little; returns the base's folder."""

    def call(*arguments: str) -> str:
        command = [sys.executable, "-m", "stackctl", *arguments, "--registry", str(folder / "registry")]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    call("init", str(folder / "registry"))
    base: str = json.loads(call("base", "add", "smollm2", "--json"))["path"]
    for number in range(max(_DEPTHS)):
        random_adapter(base, folder / f"a{number}", number)
        call("add", f"a{number}", str(folder / f"a{number}"))
    return base


def _speed(folder: Path, base: str, runs: int) -> None:
    """All models in one process, each in turn, so that they meet the same machine."""
    candidates: dict[str, Callable[[], float]] = {_BARE: _with_transformers(base, [])}
    for depth in _DEPTHS:
        adapters = [folder / f"a{number}" for number in range(depth)]
        candidates[f"PEFT, {depth} live"] = _with_transformers(base, adapters)
    for depth in _DEPTHS:
        candidates[f"stackctl, {depth} folded"] = _with_stackctl(folder, depth, live=False)
    candidates[f"stackctl --live, {max(_DEPTHS)} as one"] = _with_stackctl(folder, max(_DEPTHS), live=True)
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(runs + 1):
        for name, candidate in candidates.items():
            rate = candidate()
            if number:
                found[name].append(rate)
    print(f"{'':44}{'tokens/s':>10}{'ratio':>8}")
    bare = statistics.median(found[_BARE])
    for name, rates in found.items():
        rate = statistics.median(rates)
        print(f"{name:44}{rate:10.1f}{rate / bare:8.2f}", flush=True)


def _with_transformers(base: str, adapters: list[Path]) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
        for number, adapter in enumerate(adapters[1:], 1):
            model.load_adapter(adapter, f"a{number}")
        model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    ids = AutoTokenizer.from_pretrained(base)(_PROMPT, return_tensors="pt")

    def run() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=_TOKENS, do_sample=False)
        return (out.shape[1] - ids["input_ids"].shape[1]) / (time.perf_counter() - start)

    return run


def _with_stackctl(folder: Path, depth: int, *, live: bool) -> Callable[[], float]:
    """The command's own path, streamed."""
    from stackctl.engine.generation import Sampling, generate_reply
    from stackctl.engine.models import load_base
    from stackctl.engine.records import Prompt
    from stackctl.registry.store import Registry

    registry = Registry(folder / "registry")
    stacked = load_base(resolve_base(registry, "smollm2"), registry)
    stacked.use(
        read_plan(registry, resolve_expression(registry, "+".join(f"a{number}" for number in range(depth)))), live=live
    )
    sampling = Sampling(max_new_tokens=_TOKENS, raw=True)
    return lambda: generate_reply(stacked, Prompt(_PROMPT), sampling, lambda _: None).tokens_per_second


def _start(folder: Path, base: str, runs: int) -> None:
    """Processes from nothing to the first token; their peak is that of base, libraries and stack."""
    candidates: dict[str, Callable[[], tuple[float, float]]] = {}
    plain = [sys.executable, "-c", _PLAIN, base, _PROMPT]
    candidates[_BARE] = lambda: run_command(plain)
    for depth in _DEPTHS:
        adapters = [str(folder / f"a{number}") for number in range(depth)]
        candidates[f"PEFT, {depth} live"] = lambda a=adapters: run_command([*plain, *a])
    for depth in _DEPTHS:
        what = "+".join(f"a{number}" for number in range(depth))
        command = [sys.executable, "-m", "stackctl", "generate", what, "-p", _PROMPT, "--raw", "--max-new-tokens", "1"]
        command += ["--registry", str(folder / "registry")]
        candidates[f"stackctl generate, {depth} folded"] = lambda c=command: run_command(c)
    print("\nfrom nothing to the first token")
    show(compare(candidates, runs), _BARE)
