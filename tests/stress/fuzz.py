"""Damaged and hostile files, by the thousand: every command ends soon, says what is wrong, and touches nothing else."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections import Counter
from pathlib import Path

import msgspec
from hostile import bound, contain, damage, ill_mannered, mutate, mutate_json_line, tree

from stackctl.cli import make_app
from stackctl.core.errors import StackctlError
from stackctl.core.provenance import DataSource, Run
from stackctl.core.train_job import TrainSettings
from stackctl.registry.store import Registry
from stackctl.storage.hashes import sha256_file
from stackctl.storage.yaml_text import format_yaml

from . import kills
from .killing import run_command
from .runner import Budget, Outcome

_ROWS = [{"prompt": f"What is {n}?", "completion": f"{n}, 海, é."} for n in range(20)]
_RECIPE = {
    "base": "tiny",
    "train": {
        "style": {"data": "data.jsonl", "rank": 16, "epochs": 3},
        "tone": {"on": "style", "data": "data.jsonl", "learning_rate": 1e-4, "target_modules": ["q_proj"]},
    },
    "stacks": {"soft": "style:0.5+instruct@1"},
    "push": {"stack": "soft", "repo": "me/soft"},
}
_SETTINGS = {"on": "style", "data": "data.jsonl", "lora_r": 8, "learning_rate": 2e-4, "output_dir": "out"}
_LOG = [{"step": step, "loss": 3.0 / step, **({"eval_loss": 3.1} if step == 4 else {})} for step in range(1, 9)]

_ENTRIES = (
    "registry/registry.yaml",
    "registry/bases/tiny.yaml",
    "registry/adapters/style.yaml",
    "registry/stacks/both.yaml",
    "registry/removed/old.yaml",
)
_WEIGHTS = "registry/weights/style/2/"
TARGETS: dict[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(
        _ENTRIES,
        (
            ("ls",), ("ls", "--json"), ("inspect", "style"), ("inspect", "both", "--json"), ("inspect", "tiny"),
            ("verify",), ("use", "both"), ("compose", "style:0.5+instruct", "--name", "s"), ("rm", "both"),
            ("rm", "style@1"), ("add", "style", "new"), ("base", "ls"), ("gc",), ("train", "--dry-run"),
        ),
    ),
    **dict.fromkeys(
        ("new/adapter_model.safetensors", "new/adapter_config.json", "new/adapter_info.json", "new/tokenizer.json"),
        (
            ("add", "tone", "new"), ("add", "t", "new", "--link"), ("inspect", "./new"), ("inspect", "./new", "--json"),
            ("inspect", "--for", "gguf", "./new"), ("inspect", "./new", "--modules"),
        ),
    ),
    **dict.fromkeys(
        (f"{_WEIGHTS}adapter_model.safetensors", f"{_WEIGHTS}adapter_config.json", f"{_WEIGHTS}training_log.jsonl"),
        (
            ("verify",), ("inspect", "style@2"), ("inspect", "style@2", "--curve", "--json"), ("inspect", "both"),
            ("compose", "style@2", "--name", "s"), ("inspect", "both", "--verify"), ("ls",),
        ),
    ),
    "registry/runs/half/run.json": (("ls",), ("ls", "--json"), ("gc",)),
    "registry/runs/half/checkpoint-3/stackctl_save.json": (("ls",), ("ls", "--json"), ("gc",)),
    "registry/.digests.json": (("inspect", "both", "--verify"), ("verify",)),
    "stackctl.yaml": (("train", "--dry-run"), ("train", "--dry-run", "--json"), ("train", "style", "--rank", "0")),
    "settings.yaml": (("train", "--config", "settings.yaml"), ("train", "--config", "settings.yaml", "--json")),
}  # fmt: skip
"""A file to damage, and the commands that read it."""


def make_template(folder: Path) -> None:
    """A folder with everything that a command of the light floor reads."""
    kills.make_template(folder)
    registry = Registry(folder / "registry")
    (folder / "data.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _ROWS))
    source = DataSource(path="data.jsonl", sha256=sha256_file(folder / "data.jsonl"), records=20, format="prompt")
    run = Run(steps=8, epochs=3, loss=1.5, tokens=900, supervised_tokens=500, seconds=2.5, frozen="none")
    adapter = registry.find_adapter("style")
    assert adapter
    told = {"data": source, "run": run, "settings": msgspec.to_builtins(TrainSettings(rank=16, epochs=3))}
    versions = [msgspec.structs.replace(version, **told) for version in adapter.versions]
    registry.write(msgspec.structs.replace(adapter, versions=versions, description="the voice"))
    files = {
        "stackctl.yaml": format_yaml(_RECIPE),
        "settings.yaml": format_yaml(_SETTINGS),
        "new/adapter_info.json": json.dumps({"adapter": "new", "version": 1, "base": "tiny", "base_fingerprint": "x"}),
        f"{_WEIGHTS}training_log.jsonl": "".join(json.dumps(line) + "\n" for line in _LOG),
        "registry/runs/half/run.json": json.dumps({"settings": {"rank": 16}, "on": [["style@2", "sha256:x", 1.0]]}),
        "registry/runs/half/checkpoint-3/stackctl_save.json": json.dumps({"state.json": 2}),
        "registry/runs/half/checkpoint-3/state.json": "{}",
        "registry/.digests.json": json.dumps({"/x": [1, 2, 3, 4, "sha256:x"]}),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def try_one(template: Path, place: Path, budget: Budget, largest: int = 50_000_000) -> tuple[int | None, list[str]]:
    """Damage one file of a copy of the template, run one command that reads it.

    Returns:
        how it ended, and what was wrong with that.
    """
    target = budget.random.choice(list(TARGETS))
    arguments = budget.random.choice(TARGETS[target])
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(template, place)
    damage(place / target, budget.random, largest, pipes="--config" not in arguments)
    before = tree(place)
    ended = run_command(list(arguments), place, prepare=contain)
    problem = ill_mannered(ended.code, ended.said) or touched(before, tree(place), failed=bool(ended.code))
    if not problem:
        return ended.code, []
    given = before.get(target, b"nothing")[:600]
    return ended.code, [f"{' '.join(arguments)} with {target}: {problem}\n{ended.said[-1500:]}\n{given!r}"]


def touched(before: dict[str, bytes], after: dict[str, bytes], *, failed: bool) -> str | None:
    """What a command changed that it had no business with: anything when it failed, else what is not the registry's."""
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    wrong = sorted(name for name in changed if failed or not name.startswith("registry/"))
    return f"changed {', '.join(wrong)}" if wrong else None


def files(budget: Budget) -> Outcome:
    """Damaged entries, recipes, configurations and weights, each given to a real command."""
    make_app()  # imports them all here, instead of in each process
    template = budget.folder / "template"
    make_template(template)
    codes, failures = Counter[int | None](), list[str]()
    while budget.is_left and len(failures) < 10:
        code, wrong = try_one(template, budget.folder / "place", budget)
        codes[code] += 1
        failures += wrong
    return outcome(codes, failures)


def outcome(codes: Counter[int | None], failures: list[str]) -> Outcome:
    ends = " · ".join(f"exit {code} {count:,}" for code, count in sorted(codes.items(), key=lambda item: str(item[0])))
    return Outcome(
        f"inputs tried {codes.total():,} · hung, crashed, over their bounds or out of their place {len(failures)} · "
        f"{ends}",
        failures,
    )


def make_data(folder: Path) -> dict[str, bytes]:
    """A data file of every kind, by its suffix."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(_ROWS), folder / "whole.parquet")
    return {
        ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in _ROWS).encode(),
        ".json": json.dumps(_ROWS).encode(),
        ".txt": b"One.\n\nTwo, \xe6\xb5\xb7.\n",
        ".parquet": (folder / "whole.parquet").read_bytes(),
    }


def try_data(whole: dict[str, bytes], folder: Path, budget: Budget) -> tuple[int | None, list[str]]:
    """Read one damaged data file in a process of its own, as :func:`try_one`."""
    suffix = budget.random.choice(list(whole))
    path = folder / f"data{suffix}"
    by_line = suffix == ".jsonl" and budget.random.random() < 0.5
    path.write_bytes((mutate_json_line if by_line else mutate)(whole[suffix], budget.random))
    said = folder / "said"
    child = os.fork()
    if not child:
        os._exit(_read_data(path, said))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code in (0, 2):
        return code, []
    text = said.read_text() if said.exists() else ""
    return code, [f"{suffix}: ended with {code}\n{text[-1500:]}\n{path.read_bytes()[:600]!r}"]


def _read_data(path: Path, said: Path) -> int:
    from stackctl.engine.records.read import read_records

    said.unlink(missing_ok=True)
    try:
        bound()
        read_records(path)
    except StackctlError as error:
        if error.message and error.hint:
            return error.exit_code
        said.write_text(f"no message or no hint: {error!r}")
    except BaseException:
        said.write_text(traceback.format_exc())
    else:
        return 0
    return 99


def data(budget: Budget) -> Outcome:
    """Damaged data files of every kind."""
    whole = make_data(budget.folder)
    codes, failures = Counter[int | None](), list[str]()
    while budget.is_left and len(failures) < 10:
        code, wrong = try_data(whole, budget.folder, budget)
        codes[code] += 1
        failures += wrong
    return outcome(codes, failures)
