"""Training: stackctl at depth 0, 1, 2 and 4 beside a plain PEFT loop that pads, TRL, Unsloth and LLaMA-Factory.

There are three tables: chats of very uneven lengths; short chats, where padding to 1,024 costs most; and the uneven
chats again on a base with 200,000 words, where the logits cost most. TRL and Unsloth compute their loss in chunks.

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
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.limits import Limits, measure_limits, training_share
from benchmarks.peer_environments import LLAMA_FACTORY, TRL, UNSLOTH, Peer, peer_python, versions
from benchmarks.timing import Whole, run_stackctl, run_whole

EXAMPLES = Path(__file__).parents[1] / "examples"
BATCH, RANK = 8, 16
DEPTHS = (0, 1, 2, 4)
LEARNING_RATE = 2e-4
STACKCTL = "stackctl, {} frozen adapters"
PEFT, PEFT_1024 = "PEFT loop, padded to the longest", "PEFT loop, padded to 1,024 (one step)"
UNEVEN, SHORT, WIDE = "uneven chats", "short chats", "uneven chats, 200,000 words"
WORDS = {UNEVEN: 85, SHORT: 15, WIDE: 85}
"""Median of the words in an answer, by table."""
VOCABULARY = 200_000
WEIGHTS, HEAD_WORDS, HIDDEN = 134_515_008, 49_152, 576
"""SmolLM2's weights, of which the head's are also the embeddings'."""
PEERS = (TRL, UNSLOTH, LLAMA_FACTORY)
LAYOUTS = ("packing", "padding-free")
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
    peers: dict[Peer, Path]
    base_name: str = "smollm2"

    @property
    def registry(self) -> Path:
        return self.folder / "registry"

    def short(self) -> Bench:
        data, heldout = data_files(self.folder, SHORT)
        return replace(self, data=data, heldout=heldout)

    def wide(self) -> Bench:
        """On the base with many words, which is made if need be."""
        folder = self.folder / "wide"
        if not folder.is_dir():
            _wide_base(self.base, folder)
            run_stackctl(self.registry, "base", "add", "wide", str(folder))
        return replace(self, base=folder, base_name="wide")


Candidate = tuple[str, str]
"""The table in which something stands, and its name there."""


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks training")
    parser.add_argument("--runs", type=int, default=3, help="how often each candidate runs")
    parser.add_argument("--steps", type=int, default=6, help=f"steps of {BATCH} records each")
    parser.add_argument("--quick", action="store_true", help="one run of two steps: does it work at all")
    parser.add_argument("--only", action="append", help="part of a candidate's name; may be repeated")
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[peer.package for peer in PEERS],
        help="a tool that is left out; each of the others gets an environment in the user's cache",
    )
    asked = parser.parse_args(list(options))
    if asked.quick:
        asked.runs, asked.steps = 1, 2
    peers = {peer: peer_python(peer) for peer in PEERS if peer.package not in asked.without}
    limits = measure_limits()
    print(f"SmolLM2-135M, float32, rank {RANK}, all linear layers; {asked.steps} steps of {BATCH}, {asked.runs} runs")
    for peer, python in peers.items():
        print(f"beside {versions(python, peer.package)}")
    print(limits)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(Path(folder), asked.steps, peers)
        found = candidates(bench)
        if asked.only:
            found = {key: run for key, run in found.items() if any(part in ": ".join(key) for part in asked.only)}
        results = measure(found, asked.runs)
    for table in WORDS:
        rows = {name: measured for (where, name), measured in results.items() if where == table}
        if rows:
            show(table, rows, limits)
            check_agreement(rows)


def candidates(bench: Bench) -> dict[Candidate, Callable[[], Whole]]:
    """Every way to train, by the table and the name that it shows.

    With many words the padded loop takes two records at once: the logits of eight want more than 20 GB.
    """
    found: dict[Candidate, Callable[[], Whole]] = {
        (UNEVEN, STACKCTL.format(depth)): lambda depth=depth: stackctl(bench, depth) for depth in DEPTHS
    }
    found[UNEVEN, PEFT] = lambda: peft_loop(bench, "longest", bench.steps, BATCH)
    found[UNEVEN, PEFT_1024] = lambda: peft_loop(bench, "1024", 1, 2)
    if TRL in bench.peers:
        for layout in LAYOUTS:
            found[UNEVEN, f"trl, {layout}"] = lambda layout=layout: sft_loop(bench, TRL, "trl_loop.py", layout)
    if UNSLOTH in bench.peers:
        found[UNEVEN, "unsloth, padded"] = lambda: sft_loop(bench, UNSLOTH, "unsloth_loop.py", "padded")
    if LLAMA_FACTORY in bench.peers:
        found[UNEVEN, "llamafactory, on 1 frozen adapter"] = lambda: llama_factory_loop(bench)
    short = bench.short()
    found[SHORT, STACKCTL.format(0)] = lambda: stackctl(short, 0)
    found[SHORT, PEFT] = lambda: peft_loop(short, "longest", short.steps, BATCH)
    found[SHORT, PEFT_1024] = lambda: peft_loop(short, "1024", 1, 2)
    found[WIDE, STACKCTL.format(0)] = lambda: stackctl(bench.wide(), 0)
    found[WIDE, PEFT] = lambda: peft_loop(bench.wide(), "longest", bench.steps, 2)
    if TRL in bench.peers:
        found[WIDE, "trl, packing"] = lambda: sft_loop(bench.wide(), TRL, "trl_loop.py", "packing")
    return found


def stackctl(bench: Bench, depth: int) -> Whole:
    """``stackctl train`` on so many frozen adapters; what it registers is removed again."""
    name = f"new-{depth}"
    on = ["--on", "+".join(f"frozen-{number}" for number in range(depth))] if depth else []
    command = [
        *("train", name, *on, "--base", bench.base_name, "--data", str(bench.data), "--eval-data", str(bench.heldout)),
        *("--batch-size", str(BATCH), "--rank", str(RANK), "--epochs", "1", "--dtype", "float32"),
        *("--scheduler", "constant", "--warmup", "0", "--learning-rate", str(LEARNING_RATE)),
        *("--eval-steps", str(bench.steps), "--keep", "last", "--json", "--registry", str(bench.registry)),
    ]
    measured = run_whole([sys.executable, "-m", "stackctl", *command])
    run_stackctl(bench.registry, "rm", name)
    return measured


def peft_loop(bench: Bench, pad: str, steps: int, micro_batch: int) -> Whole:
    command = [
        *("-m", "benchmarks.peft_loop", str(bench.base), str(bench.data), str(bench.heldout), "--pad", pad),
        *("--steps", str(steps), "--batch-size", str(BATCH), "--rank", str(RANK)),
        *("--micro-batch-size", str(micro_batch)),
    ]
    return run_whole([sys.executable, *command])


def sft_loop(bench: Bench, peer: Peer, program: str, layout: str) -> Whole:
    """A program of this folder that trains by TRL's SFTTrainer, in its own environment."""
    command = [
        *(str(Path(__file__).with_name(program)), str(bench.base)),
        *(str(path.with_suffix(".tokens")) for path in (bench.data, bench.heldout)),
        *("--layout", layout, "--batch-size", str(BATCH), "--rank", str(RANK)),
    ]
    return run_whole([str(bench.peers[peer]), *command])


def llama_factory_loop(bench: Bench) -> Whole:
    command = [
        *(str(Path(__file__).with_name("llama_factory_loop.py")), str(bench.base), str(bench.folder / "frozen-0")),
        *(str(path.with_suffix(".tokens")) for path in (bench.data, bench.heldout)),
        *("--batch-size", str(BATCH), "--rank", str(RANK)),
    ]
    return run_whole([str(bench.peers[LLAMA_FACTORY]), *command])


def prepare(folder: Path, steps: int, peers: dict[Peer, Path]) -> Bench:
    """SmolLM2 in a registry, as many random adapters as the deepest stack has, and the data."""
    registry = folder / "registry"
    run_stackctl(registry, "init", str(registry))
    base = Path(run_stackctl(registry, "base", "add", "smollm2")["path"])
    _frozen_adapters(base, folder)
    for number in range(max(DEPTHS)):
        run_stackctl(registry, "add", f"frozen-{number}", str(folder / f"frozen-{number}"))
    for kind in (UNEVEN, SHORT):
        words = WORDS[kind]
        data, heldout = data_files(folder, kind)
        write_chats(data, steps * BATCH, words, seed=0)
        write_chats(heldout, 8, words, seed=1)
        for path in (data, heldout):
            write_tokens(path, base)
    return Bench(folder, base, *data_files(folder, UNEVEN), steps, peers)


def data_files(folder: Path, kind: str) -> tuple[Path, Path]:
    """Records to train on, and those held out."""
    name = kind.replace(" ", "-")
    return folder / f"{name}.jsonl", folder / f"{name}-heldout.jsonl"


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


def _wide_base(base: Path, folder: Path) -> None:
    """The base with rows for many more words, which the tokenizer never makes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCABULARY)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


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

    from stackctl.engine.data.encoding import encode
    from stackctl.engine.data.examples import EncodeOptions
    from stackctl.engine.records.read import read_records

    examples = encode(read_records(path), AutoTokenizer.from_pretrained(base), EncodeOptions(1024)).examples
    lines = [json.dumps({"input_ids": e.input_ids, "labels": e.labels}) + "\n" for e in examples]
    path.with_suffix(".tokens").write_text("".join(lines))


def measure(found: dict[Candidate, Callable[[], Whole]], runs: int) -> dict[Candidate, list[Whole]]:
    """Every candidate ``runs`` times, in turn; each figure is said on stderr as it comes, for this takes long."""
    results: dict[Candidate, list[Whole]] = {key: [] for key in found}
    for number in range(runs):
        for key, candidate in found.items():
            whole = candidate()
            results[key].append(whole)
            figures = f"{whole.said['tokens_per_second']:.1f} tokens/s, {whole.seconds:.0f} s, {whole.peak_mb:.0f} MB"
            print(f"run {number + 1}/{runs}: {': '.join(key)}: {figures}", file=sys.stderr, flush=True)
    return results


def show(title: str, results: dict[str, list[Whole]], limits: Limits) -> None:
    """Real tokens a second of the loop, their ratio to the first row, share of the machine, peaks, held-out loss."""
    weights = WEIGHTS + (VOCABULARY - HEAD_WORDS) * HIDDEN * (title == WIDE)
    speeds = {
        name: statistics.median(whole.said["tokens_per_second"] for whole in runs) for name, runs in results.items()
    }
    first = next(iter(speeds.values()))
    heads = f"{'tokens/s':>9}{'ratio':>7}{'share':>7}{'whole s':>9}{'peak MB':>9}{'supervised':>12}{'held-out':>10}"
    print(f"\n{title:40}{heads}")
    for name, runs in results.items():
        seconds = statistics.median(whole.seconds for whole in runs)
        peak, said = max(whole.peak_mb for whole in runs), runs[-1].said
        share = training_share(speeds[name], weights, limits.float32_flops)
        numbers = f"{speeds[name]:9.0f}{speeds[name] / first:7.3f}{share:7.0%}{seconds:9.0f}{peak:9.0f}"
        print(f"{name:40}{numbers}{said['supervised_tokens']:12,}{said['eval_loss']:10.3f}")


def check_agreement(results: dict[str, list[Whole]]) -> None:
    """Candidates on one stack saw the same tokens, and learned the same from them; anything else is no comparison.

    The one that takes a single step saw other tokens. LLaMA-Factory logs means of batches, whose mean is another loss.
    """
    found = {name: runs[-1].said for name, runs in results.items() if name != PEFT_1024}
    groups = [
        {name: said for name, said in found.items() if "frozen" not in name or "0 frozen" in name},
        {name: said for name, said in found.items() if "1 frozen" in name},
    ]
    for group, keys in zip(groups, (("loss", "eval_loss"), ("eval_loss",)), strict=True):
        for key in ("tokens", "supervised_tokens", *keys):
            values = {name: said[key] for name, said in group.items()}
            tolerance = AGREEMENT if key in keys else 0.0
            if values and max(values.values()) - min(values.values()) > tolerance * min(values.values()):
                sys.exit(f"these did not do the same work, by their {key}: {values}")


if __name__ == "__main__":
    main(sys.argv[1:])
