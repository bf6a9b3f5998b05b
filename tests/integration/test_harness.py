"""``eval --task``: what reaches lm-evaluation-harness, and what its answers become.

The harness is not installed here: a stand-in of its interface (0.4.13) answers with numbers that tell which weights the
model had when it was asked. ``benchmarks/harness_client.py`` runs the real one.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
from tiny_registry import CHAT

MANAGER = """
import os
class Task:
    UNSAFE_CODE = False
    def __init__(self, name, fewshot):
        self.task_name, self.settings, self.seed = name, {"num_fewshot": fewshot}, None
    def get_config(self, key): return self.settings[key]
    def set_config(self, key, value): self.settings[key] = value
    def set_fewshot_seed(self, seed): self.seed = seed
class TaskManager:
    def __init__(self, include_defaults=True):
        self.all_tasks = ["arc_easy", "codes", "far", "zero"] if include_defaults else []
    def load(self, names):
        os.system("echo a child prints")
        (name,) = names
        if name == "far":
            raise ConnectionError("no route\\nto the Hub")
        if name.endswith(".yaml") and "task:" not in open(name).read():
            raise ValueError("no task in it")
        task = Task("own" if name.endswith(".yaml") else name, {"arc_easy": None, "zero": 0}.get(name, 2))
        task.UNSAFE_CODE = name == "codes"
        return {"tasks": {task.task_name: task}}
"""
MODEL = """
class HFLM:
    made = 0
    def __init__(self, pretrained, tokenizer, batch_size):
        HFLM.made += 1
        self.model, self.batch_size = pretrained, batch_size
        pretrained.tie_weights()
"""
PACKAGE = """
import os, torch
def evaluate(lm, task_dict, limit, bootstrap_iters, log_samples):
    from lm_eval.models.huggingface import HFLM
    print("printed by Python"); os.write(1, b"written to the descriptor\\n")
    with torch.no_grad():
        logits = lm.model(input_ids=torch.arange(3, 35)[None] * 7 % 250, use_cache=False).logits
    names = list(task_dict["tasks"])
    return {
        "results": {name: {
            "alias": name, "sample_len": limit or 9, "sum,none": logits.abs().sum().item(), "sum_stderr,none": 0.25,
            "exact,strict": 0.5, "exact_stderr,strict": "N/A", "batch,none": float(lm.batch_size),
            "models,none": float(HFLM.made), "text,none": "N/A",
        } for name in names},
        "higher_is_better": {name: {"sum": False, "exact": True} for name in names},
        "n-shot": {name: task.settings["num_fewshot"] for name, task in task_dict["tasks"].items()},
        "versions": {name: 1.0 for name in names},
        "n-samples": {name: {"original": 9, "effective": limit or 9} for name in names},
    }
"""


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "__init__.py": PACKAGE,
        "tasks.py": MANAGER,
        "defaults.py": "DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED = 1234, 0",
        "models/__init__.py": "",
        "models/huggingface.py": MODEL,
    }
    for name, text in parts.items():
        file = tmp_path / "stand-in" / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "stand-in")
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)


def sums(h: Any, *members: tuple[str, float]) -> float:
    return float(oracle.logits(oracle.live(h.base, *h.members(*members)), oracle.TOKENS).abs().sum())


def test_each_stack_is_put_to_each_task_on_a_base_that_is_loaded_once(tiny_registry: Any, harness: None) -> None:
    h = tiny_registry("tied")
    h.add("style", seed=1, target_modules=["q_proj", "lm_head"])  # which unties what the harness ties
    h.add("instruct", seed=2)
    (h.folder / "own.yaml").write_text("task: own\n")
    ran = h.run(
        "eval", "base", "style", "style+instruct:0.5", "base", "--base", "tiny", "--data", h.data(CHAT),
        *("--task", "arc_easy", "--task", "own.yaml", "--limit", 4, "--batch-size", 3, "--json"),
    )  # fmt: skip
    rows, results = ran.json["tasks"], ran.json["results"]
    assert [row["stack"] for row in rows[::8]] == ["base", "style", "style+instruct:0.5", "base"]
    found = {(row["stack"], row["task"], row["metric"]): row for row in rows}
    wanted = {
        "base": sums(h),
        "style": sums(h, ("style", 1)),
        "style+instruct:0.5": sums(h, ("style", 1), ("instruct", 0.5)),
    }
    for stack, value in wanted.items():
        for task, fewshot in (("arc_easy", 0), ("own", 2)):
            row = found[stack, task, "sum"]
            assert row["value"] == pytest.approx(value, rel=1e-5)
            assert (row["standard_error"], row["higher_is_better"], row["records"]) == (0.25, False, 4)
            assert (row["num_fewshot"], row["version"], row["filter"]) == (fewshot, "1.0", "none")
            assert found[stack, task, "exact"]["filter"] == "strict"
            assert found[stack, task, "exact"]["standard_error"] is None
            assert found[stack, task, "batch"]["value"] == 3
            assert found[stack, task, "models"]["value"] == 1
            assert (stack, task, "text") not in found, "what is not a number is no score"
    assert len({round(value, 3) for value in wanted.values()}) == 3
    assert "a child prints" in ran.err and "written to the descriptor" in ran.err and "printed by Python" in ran.err
    for row, members in zip(results[:2], ([], [("style", 1.0)]), strict=True):
        assert row["loss"] == pytest.approx(oracle.loss(oracle.live(h.base, *h.members(*members)), CHAT), rel=1e-5)


def test_solved_examples_and_the_table(h: Any, harness: None) -> None:
    h.add("style", seed=1)
    rows = h.run("eval", "style", "--task", "arc_easy", "--task", "zero", "--num-fewshot", 5, "--json").json["tasks"]
    assert {row["task"]: row["num_fewshot"] for row in rows} == {"arc_easy": 5, "zero": 0}
    shown = h.run("eval", "base", "style", "--task", "arc_easy", "--base", "tiny").out
    assert "exact (strict)" in shown
    sums_ = [line.split() for line in shown.splitlines() if " ± " not in line and "0.2500" in line]
    values = [float(next(word for word in line if "." in word).rstrip("*")) for line in sums_]
    assert [any("*" in word for word in line) for line in sums_] == [value == min(values) for value in values]


def test_what_cannot_be_put_to_a_model_is_told_before_one_is_loaded(
    h: Any, harness: None, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stackctl.engine.models.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    (h.folder / "bad.yaml").write_text("dataset_path: json\n")
    (h.folder / "one.yaml").write_text("task: own\n")
    (h.folder / "two.yaml").write_text("task: own\n")

    def said(*tasks: str, code: int) -> str:
        return str(
            fails("eval", "base", "--base", "tiny", *(word for task in tasks for word in ("--task", task)), code=code)
        )

    both = said("arc_eesy", "absent.yaml", "nonsense", code=3)
    assert (
        "absent.yaml" in both and "'arc_eesy'" in both and "'nonsense'" in both and "did you mean 'arc_easy'?" in both
    )

    assert "no route" in said("far", code=6)
    assert "bad.yaml" in said("bad.yaml", code=2)
    assert "own" in said("one.yaml", "two.yaml", code=2)
    assert "codes" in said("codes", code=4)


def test_without_the_extra_it_says_how_to_get_it(
    tiny_registry: Any, fails: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    tiny_registry()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more)
    )
    monkeypatch.setattr("stackctl.engine.models.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    assert "pip install 'stackctl-lora[eval]'" in fails("eval", "base", "--base", "tiny", "--task", "arc_easy", code=4)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--data", "data.jsonl", "--limit", "3"], "--limit"),
        (["--data", "data.jsonl", "--num-fewshot", "3", "--batch-size", "2"], "--num-fewshot and --batch-size"),
        (["--task", "arc_easy", "--against", "style"], "--against"),
        ([], "no data"),
    ],
)
def test_options_that_would_change_nothing_are_refused(h: Any, fails: Any, options: list[str], named: str) -> None:
    h.add("style", seed=1)
    h.data(CHAT)
    assert named in fails("eval", "style", *options, code=2)
