"""Where the factor A of a second adapter begins: with the first one's seed, apart from it, or orthogonal to it.

For each seed ``style`` is trained once on the bare base, and ``instruct`` on it three times, over the same records in
the same order: ``shared`` draws A with the seed of style, which is what PEFT does; ``apart`` with a seed made of that
and of the frozen stack, the default; ``orthogonal`` is ``--orthogonal``. Then the losses of the stacks on held-out
records, and the overlap of their row spaces. What counts are differences within a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.training import EXAMPLES

BEGINNINGS = ("shared", "apart", "orthogonal")
LOSSES = ("style", "instruct")
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Student's t at 95 % on both sides, by the number of seeds."""


def main(options: Sequence[str] = ()) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks beginnings")
    parser.add_argument("--seeds", type=int, default=3, help="1 to 10 (3)")
    parser.add_argument("--first-seed", type=int, default=0, help="so that several processes share the seeds (0)")
    parser.add_argument("--style-steps", type=int, default=12, help="of style (12)")
    parser.add_argument("--steps", type=int, default=10, help="of instruct (10)")
    parser.add_argument("--batch-size", type=int, default=4, help="records in a step (4)")
    asked = parser.parse_args(options)
    if asked.seeds not in (1, *T_95):
        parser.error("--seeds: 1 to 10")
    print(f"SmolLM2-135M, rank 16, {asked.style_steps} and {asked.steps} steps of {asked.batch_size} records")
    print(f"{'seed':>4} {'stack':20}{'style':>9}{'instruct':>10}{'rows':>10}{'largest':>10}{'seconds':>9}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        registry = Path(name) / "registry"
        _in_process(registry, "init", str(registry))
        _in_process(registry, "base", "add", "smollm2")
        seeds = [_one_seed(registry, seed, asked) for seed in range(asked.first_seed, asked.first_seed + asked.seeds)]
    if asked.seeds > 1:
        _compare(seeds)


def _one_seed(registry: Path, seed: int, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The rows of one seed, by beginning."""
    style = f"style-{seed}"
    same = ("--batch-size", asked.batch_size, "--rank", 16, "--learning-rate", "1e-3", "--seed", seed)
    _in_process(registry, "train", style, "--data", EXAMPLES / "style.jsonl", "--max-steps", asked.style_steps, *same)
    rows = {"style alone": _score(registry, [style])[style]}
    _show(seed, "style alone", rows["style alone"])
    for beginning in BEGINNINGS:
        name = f"{beginning}-{seed}"
        more = ["--orthogonal"] if beginning == "orthogonal" else []
        begun = time.perf_counter()
        with _drawn_with_the_jobs_seed() if beginning == "shared" else contextlib.nullcontext():
            _in_process(registry, "train", name, "--on", style, "--data", EXAMPLES / "instruct.jsonl", *more, *same,
                        "--max-steps", asked.steps)  # fmt: skip
        seconds = time.perf_counter() - begun
        stack = f"{style}+{name}"
        [pair] = _in_process(registry, "inspect", stack, "--interference")["interference"]["pairs"]
        largest = max(module["rows"] for module in pair["modules"])
        row = {**_score(registry, [stack])[stack], "rows": pair["rows"], "largest": largest, "seconds": seconds}
        rows[beginning] = row
        _show(seed, beginning, row)
    return rows


def _drawn_with_the_jobs_seed() -> Any:
    """As if there were no frozen stack when A is drawn."""
    from stackctl.jobs.job import PreparedJob

    return mock.patch.object(PreparedJob, "initial_seed", property(lambda prepared: prepared.job.seed))


def _score(registry: Path, stacks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Held-out losses by stack and by what they are of."""
    found: dict[str, dict[str, float]] = {stack: {} for stack in stacks}
    for data in LOSSES:
        for row in _in_process(registry, "eval", *stacks, "--data", EXAMPLES / f"{data}-heldout.jsonl")["results"]:
            found[row["stack"]][data] = row["loss"]
    return found


def _show(seed: int, what: str, row: dict[str, float]) -> None:
    more = f"{row['rows']:10.1e}{row['largest']:10.1e}{row['seconds']:9.0f}" if "rows" in row else ""
    print(f"{seed:4d} {what:20}{row['style']:9.4f}{row['instruct']:10.4f}{more}", flush=True)


def _compare(seeds: Sequence[dict[str, dict[str, float]]]) -> None:
    """Each beginning minus the shared one: the mean over the seeds, and the half of its 95 % interval."""
    print(f"\n{'minus shared':20}{'style':>20}{'instruct':>20}")
    for beginning in BEGINNINGS[1:]:
        cells = []
        for data in LOSSES:
            apart = [seed[beginning][data] - seed["shared"][data] for seed in seeds]
            half = T_95[len(apart)] * statistics.stdev(apart) / len(apart) ** 0.5
            cells.append(f"{statistics.fmean(apart):+.4f} ± {half:.4f}")
        print(f"{beginning:20}{cells[0]:>20}{cells[1]:>20}")


def _in_process(registry: Path, *arguments: Any) -> dict[str, Any]:
    """The JSON document of a command in this process, where its beginning can be patched."""
    from stackctl.cli import main as stackctl

    out, err = io.StringIO(), io.StringIO()
    command = ["stackctl", *map(str, arguments), "--json", "--registry", str(registry)]
    with mock.patch.object(sys, "argv", command), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            stackctl()
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"{' '.join(command)}: {err.getvalue()[-4000:]}") from None
    found: dict[str, Any] = json.loads(out.getvalue().strip().splitlines()[-1])
    return found
