"""Generation: whole commands beside scripts on transformers and PEFT, and llama.cpp on the same model.

Every candidate is a process that people would type. It runs twice: to its first token, which is timed from nothing,
and for a whole answer, of which it says itself how many tokens a second it decodes. Scripts and commands run in turn,
after one token of each that does not count. At the end 32 prompts of uneven length, as whole processes.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.export import random_adapter
from benchmarks.limits import decoding_share, measure_limits
from benchmarks.timing import Whole, parse_runs, run_stackctl, run_whole

_DEPTHS = (1, 2, 4)
_TOKENS = 48
_MANY = tuple("Once upon a time " + "the sea and the old boat " * (number * number // 40) for number in range(32))
"""Prompts of 4 to 148 words."""
_PROMPT = "Once upon a time, in a small village by the sea,"
_BARE = "transformers, the bare base"
_WEIGHT_BYTES = {"float32": 134_515_008 * 4, "llama.cpp": 98_000_000}
"""What is read for one token of SmolLM2: its weights in float32, and in the GGUF file (Q4_1, the head in 8 bits)."""
_PLAIN = """
import json, sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer
base, prompt, tokens, *adapters = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
if adapters:
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, f"a{number}")
    model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
ids = tokenizer(prompt, return_tensors="pt")
start = time.perf_counter()
out = model.generate(**ids, max_new_tokens=int(tokens), do_sample=False)
seconds = time.perf_counter() - start
new = out[0, ids["input_ids"].shape[1]:]
print(json.dumps({"text": tokenizer.decode(new), "tokens_per_second": len(new) / seconds}))
"""
"""What one writes by hand."""
_PADDED = """
import json, sys, time
from transformers import AutoModelForCausalLM, AutoTokenizer
base, prompts, tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
model = AutoModelForCausalLM.from_pretrained(base)
texts = [json.loads(line)["prompt"] for line in open(prompts)]
batch = tokenizer(texts, return_tensors="pt", padding=True)
out = model.generate(**batch, max_new_tokens=int(tokens), do_sample=False)
for row in out[:, batch["input_ids"].shape[1]:]:
    print(json.dumps({"text": tokenizer.decode(row, skip_special_tokens=True)}))
"""
"""The same for many prompts: one batch, padded on the left."""


def main(options: Sequence[str] = ()) -> None:
    runs = parse_runs(options, "generation", 5)
    limits = measure_limits()
    print(limits)
    with tempfile.TemporaryDirectory() as folder:
        base = prepare(Path(folder))
        commands = candidates(Path(folder), base)
        answers: dict[str, list[Whole]] = {name: [] for name in commands}
        starts: dict[str, list[Whole]] = {name: [] for name in commands}
        for number in range(runs + 1):
            for name, (command, option) in commands.items():
                for found, tokens in ((starts, 1), (answers, _TOKENS)) if number else ((None, 1),):
                    whole = run_whole([*command, *option, str(tokens)] if option else _plain(command, tokens))
                    if found is not None:
                        found[name].append(whole)
        show(answers, starts, limits.bytes_read)
        show_many(many(Path(folder), base, runs))


def prepare(folder: Path) -> str:
    """A registry with SmolLM2 and four rank-16 adapters that change it a little; returns the base's folder."""

    registry = folder / "registry"
    run_stackctl(registry, "init")
    base: str = run_stackctl(registry, "base", "add", "smollm2")["path"]
    for number in range(max(_DEPTHS)):
        random_adapter(base, folder / f"a{number}", number)
        run_stackctl(registry, "add", f"a{number}", folder / f"a{number}")
    return base


def candidates(folder: Path, base: str) -> dict[str, tuple[list[str], list[str]]]:
    """Commands, and the option that bounds their tokens; a script takes it in its third place."""
    plain = [sys.executable, "-c", _PLAIN, base, _PROMPT]
    found: dict[str, tuple[list[str], list[str]]] = {_BARE: (plain, [])}
    for depth in _DEPTHS:
        found[f"PEFT, {depth} live"] = ([*plain, *(str(folder / f"a{number}") for number in range(depth))], [])
    for depth in (0, *_DEPTHS):
        found[f"stackctl generate, {depth} folded"] = (_generate(folder, depth), ["--max-new-tokens"])
    deepest = max(_DEPTHS)
    found[f"stackctl generate --live, {deepest}"] = (_generate(folder, deepest, "--live"), ["--max-new-tokens"])
    for depth in (0, 2):
        command = _generate(folder, depth, "--engine", "llama.cpp")
        found[f"stackctl generate, llama.cpp, {depth}"] = (command, ["--max-new-tokens"])
    return found


def _generate(folder: Path, depth: int, *options: str) -> list[str]:
    what = "+".join(f"a{number}" for number in range(depth)) or "base"
    command = [sys.executable, "-m", "stackctl", "generate", what, "-p", _PROMPT, "--raw", "--json", *options]
    return [*command, "--registry", str(folder / "registry")]


def many(folder: Path, base: str, runs: int) -> dict[str, list[Whole]]:
    """Whole processes that answer all of ``_MANY``."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in _MANY))
    ours = [sys.executable, "-m", "stackctl", "generate", "base", "--prompts", str(prompts), "--raw", "--json"]
    commands = {
        "transformers, one padded batch": [sys.executable, "-c", _PADDED, base, str(prompts), str(_TOKENS)],
        "stackctl generate": [*ours, "--max-new-tokens", str(_TOKENS), "--registry", str(folder / "registry")],
    }
    found: dict[str, list[Whole]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            found[name].append(run_whole(command))
    return found


def _plain(command: list[str], tokens: int) -> list[str]:
    """The script with its count of tokens before the adapters."""
    return [*command[:5], str(tokens), *command[5:]]


def show(answers: dict[str, list[Whole]], starts: dict[str, list[Whole]], bytes_read: float) -> None:
    """Medians of tokens a second and of seconds to the first token, as ratios to the bare base in transformers."""
    rates = {
        name: statistics.median(whole.said["tokens_per_second"] for whole in runs) for name, runs in answers.items()
    }
    seconds = {name: statistics.median(whole.seconds for whole in runs) for name, runs in starts.items()}
    print(f"{'':36}{'tokens/s':>10}{'ratio':>7}{'of memory':>11}{'first token s':>15}{'ratio':>7}{'peak MB':>9}")
    for name, rate in rates.items():
        weights = _WEIGHT_BYTES["llama.cpp" if "llama.cpp" in name else "float32"]
        share, first = decoding_share(rate, weights, bytes_read), seconds[name]
        peak = max(whole.peak_mb for whole in answers[name])
        ratios = f"{rate / rates[_BARE]:7.2f}{share:11.0%}{first:15.2f}{first / seconds[_BARE]:7.2f}"
        print(f"{name:36}{rate:10.1f}{ratios}{peak:9.0f}", flush=True)
    for depth in _DEPTHS:
        names = (f"PEFT, {depth} live", f"stackctl generate, {depth} folded")
        texts = [answers[name][-1].said["text"] for name in names]
        print(f"depth {depth}: the texts are {'equal' if texts[0] == texts[1] else f'not equal: {texts}'}")


def show_many(found: dict[str, list[Whole]]) -> None:
    """Medians of the seconds of whole processes, and how many of the texts are the same."""
    print(f"\n{f'{len(_MANY)} prompts, {_TOKENS} tokens each':36}{'seconds':>10}{'ratio':>7}{'peak MB':>9}")
    seconds = {name: statistics.median(whole.seconds for whole in runs) for name, runs in found.items()}
    theirs = next(iter(seconds.values()))
    for name, taken in seconds.items():
        print(f"{name:36}{taken:10.1f}{theirs / taken:7.2f}{max(whole.peak_mb for whole in found[name]):9.0f}")
    one, other = (
        [json.loads(line)["text"] for line in runs[-1].out.splitlines() if line.startswith("{")]
        for runs in found.values()
    )
    print(f"{sum(a == b for a, b in zip(one, other, strict=True))} of {len(_MANY)} texts are equal")


if __name__ == "__main__":
    main()
