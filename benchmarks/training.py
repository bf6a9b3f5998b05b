"""Training: stackctl at depth 0, 1, 2 and 4 beside a plain PEFT loop that pads and TRL's SFTTrainer.

There are two tables: chats of very uneven lengths, and short chats, where padding to 1,024 costs most.

Every candidate is a command that trains the same adapter once over the same records in float32 and prints its real
tokens a second, by its own loop's time. They run in turn, A B C A B C; what is shown are medians and their ratios. That
all do the same work is looked at: the same tokens are supervised, and the losses agree.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.timing import run_json
from benchmarks.trl_environment import trl_python, versions

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, RANK = 8, 16
DEPTHS = (0, 1, 2, 4)
LEARNING_RATE = 2e-4
STACKCTL = "stackctl, {} frozen adapters"
PEFT, PEFT_1024 = "PEFT loop, padded to the longest", "PEFT loop, padded to 1,024 (one step)"
UNEVEN, SHORT = "uneven chats", "short chats"
WORDS = {UNEVEN: 85, SHORT: 15}
"""Median of the words in an answer."""
AGREEMENT = 0.02
"""Largest relative distance between losses of candidates that saw the same records in another order."""


@dataclass(frozen=True)
class Bench:
    """What all candidates share: the data, the base's folder, a registry with frozen adapters, and how long to train.

    ``steps`` is that of most candidates. One that pads to 1,024 takes a single step, for it is that much longer, and
    takes it in parts of two records: eight at once want more than 20 GB.
    """

    folder: Path
    base: Path
    data: Path
    heldout: Path
    steps: int
    trl: Path | None

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    def with_data(self, kind: str) -> Bench:
        data, heldout = data_files(self.folder, kind)
        return replace(self, data=data, heldout=heldout)


Candidate = tuple[str, str]
"""The table in which something stands, and its name there."""
Measured = tuple[dict[str, Any], float]
"""What a candidate printed (tokens, supervised_tokens, tokens_per_second, loss, eval_loss), and its peak megabytes."""


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training")
    parser.add_argument("--runs", type=int, default=3, help="how often each candidate runs")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of {BATCH} records each")
    parser.add_argument("--quick", action="store_true", help="one run of two steps: does it work at all")
    parser.add_argument("--only", action="append", help="part of a candidate's name; may be repeated")
    parser.add_argument(
        "--trl",
        default="",
        metavar="PYTHON",
        help="a Python with TRL; else one is made in a cache; 'none' leaves it out",
    )
    asked = parser.parse_args(list(options))
    if asked.quick:
        asked.runs, asked.steps = 1, 2
    trl = None if asked.trl == "none" else Path(asked.trl) if asked.trl else trl_python()
    print(f"SmolLM2-135M, float32, rank {RANK}, all linear layers; {asked.steps} steps of {BATCH}, {asked.runs} runs")
    if trl:
        print(f"beside {versions(trl)}")
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(Path(folder), asked.steps, trl)
        found = candidates(bench)
        if asked.only:
            found = {key: run for key, run in found.items() if any(part in ": ".join(key) for part in asked.only)}
        results = measure(found, asked.runs)
    for table in WORDS:
        rows = {name: measured for (where, name), measured in results.items() if where == table}
        if rows:
            show(table, rows)
            check_agreement(rows)


def candidates(bench: Bench) -> dict[Candidate, Callable[[], Measured]]:
    """Every way to train, by the table and the name that it shows."""
    found: dict[Candidate, Callable[[], Measured]] = {
        (UNEVEN, STACKCTL.format(depth)): lambda depth=depth: stackctl(bench, depth) for depth in DEPTHS
    }
    found[UNEVEN, PEFT] = lambda: peft_loop(bench, "longest", bench.steps, BATCH)
    found[UNEVEN, PEFT_1024] = lambda: peft_loop(bench, "1024", 1, 2)
    if python := bench.trl:
        for layout in ("packing", "padding-free"):
            found[UNEVEN, f"TRL SFTTrainer, {layout}"] = lambda layout=layout: trl_loop(bench, python, layout)
    short = bench.with_data(SHORT)
    found[SHORT, STACKCTL.format(0)] = lambda: stackctl(short, 0)
    found[SHORT, PEFT] = lambda: peft_loop(short, "longest", short.steps, BATCH)
    found[SHORT, PEFT_1024] = lambda: peft_loop(short, "1024", 1, 2)
    return found


def stackctl(bench: Bench, depth: int) -> Measured:
    """``stackctl train`` on so many frozen adapters; what it registers is removed again."""
    name = f"new-{depth}"
    on = ["--on", "+".join(f"frozen-{number}" for number in range(depth))] if depth else []
    command = [
        *("train", name, *on, "--base", "smollm2", "--data", str(bench.data), "--eval-data", str(bench.heldout)),
        *("--batch-size", str(BATCH), "--rank", str(RANK), "--epochs", "1", "--dtype", "float32"),
        *("--scheduler", "constant", "--warmup", "0", "--learning-rate", str(LEARNING_RATE)),
        *("--eval-steps", str(bench.steps), "--keep", "last", "--json", "--registry", str(bench.registry)),
    ]
    measured = run_json([sys.executable, "-m", "stackctl", *command])
    _call(bench.registry, "rm", name)
    return measured


def peft_loop(bench: Bench, pad: str, steps: int, micro_batch: int) -> Measured:
    command = [
        *("-m", "benchmarks.peft_loop", str(bench.base), str(bench.data), str(bench.heldout), "--pad", pad),
        *("--steps", str(steps), "--batch-size", str(BATCH), "--rank", str(RANK)),
        *("--micro-batch-size", str(micro_batch)),
    ]
    return run_json([sys.executable, *command])


def trl_loop(bench: Bench, python: Path, layout: str) -> Measured:
    command = [
        *(str(Path(__file__).with_name("trl_loop.py")), str(bench.base)),
        *(str(path.with_suffix(".tokens")) for path in (bench.data, bench.heldout)),
        *("--layout", layout, "--batch-size", str(BATCH), "--rank", str(RANK)),
    ]
    return run_json([str(python), *command])


def prepare(folder: Path, steps: int, trl: Path | None) -> Bench:
    """SmolLM2 in a registry, as many random adapters as the deepest stack has, and the data."""
    registry = folder / "registry"
    _call(registry, "init", str(registry))
    base = Path(json.loads(_call(registry, "base", "add", "smollm2", "--json"))["path"])
    _frozen_adapters(base, folder)
    for number in range(max(DEPTHS)):
        _call(registry, "add", f"frozen-{number}", str(folder / f"frozen-{number}"))
    for kind, words in WORDS.items():
        data, heldout = data_files(folder, kind)
        write_chats(data, steps * BATCH, words, seed=0)
        write_chats(heldout, 8, words, seed=1)
        for path in (data, heldout):
            write_tokens(path, base)
    return Bench(folder, base, *data_files(folder, UNEVEN), steps, trl)


def data_files(folder: Path, kind: str) -> tuple[Path, Path]:
    """Records to train on, and those held out."""
    name = kind.replace(" ", "-")
    return folder / f"{name}.jsonl", folder / f"{name}-heldout.jsonl"


def _call(registry: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "stackctl", *arguments, "--registry", str(registry)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _frozen_adapters(base: Path, folder: Path) -> None:
    """Random adapters of the usual size of a trained one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for number in range(max(DEPTHS)):
        torch.manual_seed(number)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(folder / f"frozen-{number}")


def write_chats(path: Path, count: int, median: int, *, seed: int) -> None:
    """Chats of one question each, whose answers are as uneven in length as those people collect.

    The words of an answer are log-normal with ``median``. At 85, one record in twenty has more than 600 tokens; the
    longest stays under 1,024.
    """
    texts = [json.loads(line)["text"] for line in (EXAMPLES / "style.jsonl").read_text().splitlines()]
    chats = [json.loads(line)["messages"] for line in (EXAMPLES / "instruct.jsonl").read_text().splitlines()]
    words = " ".join(texts).split()
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        wanted = min(int(math.exp(generator.gauss(math.log(median), 1.0))), 700)
        start = generator.randrange(len(words) - wanted)
        question = generator.choice(chats)[0]["content"]
        answer = " ".join(words[start : start + max(wanted, 5)])
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    path.write_text("".join(lines))


def write_tokens(path: Path, base: Path) -> None:
    """The same records as tokens and labels, for a program that would tokenise and mask them by itself."""
    from transformers import AutoTokenizer

    from stackctl.engine.data import encode
    from stackctl.engine.records import read_records

    examples = encode(read_records(path), AutoTokenizer.from_pretrained(base), max_length=1024).examples
    lines = [json.dumps({"input_ids": e.input_ids, "labels": e.labels}) + "\n" for e in examples]
    path.with_suffix(".tokens").write_text("".join(lines))


def measure(found: dict[Candidate, Callable[[], Measured]], runs: int) -> dict[Candidate, list[Measured]]:
    """Every candidate ``runs`` times, in turn; each figure is said on stderr as it comes, for this takes long."""
    results: dict[Candidate, list[Measured]] = {key: [] for key in found}
    for number in range(runs):
        for key, candidate in found.items():
            said, peak = candidate()
            results[key].append((said, peak))
            figures = f"{said['tokens_per_second']:.1f} tokens/s, {peak:.0f} MB"
            print(f"run {number + 1}/{runs}: {': '.join(key)}: {figures}", file=sys.stderr, flush=True)
    return results


def show(title: str, results: dict[str, list[Measured]]) -> None:
    """A table of real tokens a second, their ratio to the first row, peaks and held-out loss."""
    speeds = {
        name: statistics.median(said["tokens_per_second"] for said, _ in measured) for name, measured in results.items()
    }
    first = next(iter(speeds.values()))
    print(f"{title:40}{'tokens/s':>10}{'ratio':>8}{'peak MB':>9}{'supervised':>12}{'loss':>8}{'held-out':>10}")
    for name, measured in results.items():
        peak = max(peak for _, peak in measured)
        said = measured[-1][0]
        numbers = f"{speeds[name]:10.0f}{speeds[name] / first:8.3f}{peak:9.0f}{said['supervised_tokens']:12,}"
        print(f"{name:40}{numbers}{said['loss']:8.3f}{said['eval_loss']:10.3f}")


def check_agreement(results: dict[str, list[Measured]]) -> None:
    """Candidates on the bare base saw the same tokens, and learned the same from them; anything else is no comparison.

    One that trains on frozen adapters has another loss, and one that takes fewer steps other tokens.
    """
    bare = [name for name in results if "frozen" not in name or "0 frozen" in name]
    found = {name: results[name][-1][0] for name in bare if name != PEFT_1024}
    for key, tolerance in (("tokens", 0.0), ("supervised_tokens", 0.0), ("loss", AGREEMENT), ("eval_loss", AGREEMENT)):
        values = {name: said[key] for name, said in found.items()}
        if values and max(values.values()) - min(values.values()) > tolerance * min(values.values()):
            sys.exit(f"these did not do the same work, by their {key}: {values}")


if __name__ == "__main__":
    main(sys.argv[1:])
