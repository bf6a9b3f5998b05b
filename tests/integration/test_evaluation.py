"""The loss of a stack: raw PEFT with all members live, on the tokens that are supervised and no others."""

from __future__ import annotations

import math
import shutil
from typing import Any

import oracle
import pytest
import torch
from tiny_registry import CHAT, TEXTS
from transformers import AutoTokenizer

from stackctl.engine.data.encoding import encode
from stackctl.engine.data.examples import EncodeOptions, Example
from stackctl.engine.evaluation.scoring import DataSet, Scoring, rows_of
from stackctl.engine.records.read import read_records

ROWS = {
    "base": [],
    "style": [("style", 1)],
    "style+instruct": [("style", 1), ("instruct", 1)],
    "style:0.5+instruct:-1": [("style", 0.5), ("instruct", -1)],
}


def accuracy_and_error(model: Any, records: list[dict[str, Any]], mean: float) -> tuple[float, float]:
    """By raw PEFT: the share of supervised tokens predicted right, and the ratio estimator's standard error."""
    right, left_over = 0, 0.0
    for record in records:
        ids, supervised = oracle.label(record)
        guesses = oracle.logits(model, torch.tensor([ids])).argmax(-1).tolist()
        right += sum(guesses[i - 1] == ids[i] for i in range(1, len(ids)) if supervised[i])
        tokens = sum(supervised[1:])
        left_over += (float(oracle.loss_sum(model, record).detach()) - mean * tokens) ** 2
    count, total = len(records), oracle.supervised_count(records)
    return right / total, math.sqrt(count / (count - 1) * left_over) / total


@pytest.mark.parametrize(
    ("name", "records"), [("llama", CHAT), ("llama", TEXTS), ("qwen3", TEXTS), ("gpt2", CHAT), ("mixtral", CHAT)]
)
def test_loss_is_that_of_raw_peft_live(tiny_registry: Any, name: str, records: list[dict[str, Any]]) -> None:
    h = tiny_registry(name)
    targets = {"target_modules": ["q_proj", "v_proj"]} if name == "mixtral" else {}
    h.add("style", seed=1, **targets)
    h.add("instruct", seed=2, r=2, use_rslora=True, **targets)
    found = h.run("eval", *ROWS, "--data", h.data(records), "--json").json["results"]
    assert [row["stack"] for row in found] == list(ROWS), "a row for each stack, in the order asked for"
    for row, members in zip(found, ROWS.values(), strict=True):
        model = oracle.live(h.base, *h.members(*members))
        wanted = oracle.loss(model, records)
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(wanted), rel=1e-4)
        assert row["tokens"] == oracle.supervised_count(records)
        assert row["records"] == len(records)
        correct, error = accuracy_and_error(model, records, wanted)
        assert row["accuracy"] == pytest.approx(correct)
        assert row["standard_error"] == pytest.approx(error, rel=1e-3)
    assert len({round(row["loss"], 4) for row in found}) == len(ROWS)


def test_a_stacks_loss_does_not_depend_on_its_company(tiny_registry: Any) -> None:
    """Stacks are folded one after another into the same weights; each must come out as if it were alone."""
    h = tiny_registry("tied")
    h.add("style", seed=1, target_modules=["embed_tokens", "q_proj"])
    h.add("head", seed=2, target_modules=["lm_head"])
    data = h.data(CHAT)

    def losses(*what: str) -> list[float]:
        return [row["loss"] for row in h.run("eval", *what, "--data", data, "--json").json["results"]]

    together = losses("style", "head", "base", "style+head", "style", "base")
    assert [together[0], together[4]] == losses("style") * 2
    assert [together[2], together[5]] == losses("base") * 2


def test_the_current_stack_and_a_named_one(h: Any) -> None:
    h.add("style", seed=1)
    h.add("instruct", seed=2)
    h.run("compose", "style:0.5+instruct", "--name", "teller")
    data = h.data(CHAT)
    wanted = oracle.loss(oracle.live(h.base, *h.members(("style", 0.5), ("instruct", 1))), CHAT)
    for what in ([], ["teller"]):
        row = h.run("eval", *what, "--data", data, "--json").json["results"][0]
        assert row["loss"] == pytest.approx(wanted, rel=1e-5)
        assert row["stack"] == "teller"
    double = h.run("eval", "teller:2", "--data", data, "--json").json["results"][0]["loss"]
    twice = oracle.live(h.base, *h.members(("style", 1), ("instruct", 2)))
    assert double == pytest.approx(oracle.loss(twice, CHAT), rel=1e-5)


def test_what_is_too_long_is_cut_and_still_counted_right(h: Any) -> None:
    long = [{"text": "abc " * 40}, {"text": "short"}]
    cut = [{"text": "abc " * 8}, {"text": "short"}]
    found = h.run("eval", "base", "--data", h.data(long), "--max-length", 32, "--json").json["results"][0]
    assert found["tokens"] == 31 + 5
    model = oracle.live(h.base)
    first, second = (float(oracle.loss_sum(model, record).detach()) for record in cut)
    ids, _ = oracle.label(cut[0])
    out = oracle.logits(model, torch.tensor([ids]))
    # No end is learned where a text was cut.
    last = -float(out[-2].log_softmax(-1)[ids[-1]])
    assert found["loss"] == pytest.approx((first - last + second) / 36, rel=1e-5)


def test_a_training_is_better_on_what_it_learned(h: Any) -> None:
    h.train("style", "--max-steps", 30, "--learning-rate", 0.01, records=TEXTS)
    held = h.data(TEXTS)
    base, style = h.run("eval", "base", "style", "--data", held, "--json").json["results"]
    assert style["loss"] < base["loss"] - 0.5
    again = oracle.loss(oracle.live(h.base, (h.weights("style"), 1)), TEXTS)
    assert style["loss"] == pytest.approx(again, rel=1e-5)


def test_against_tests_every_stack_on_the_same_records(h: Any) -> None:
    h.add("style", seed=1)
    h.add("instruct", seed=2, scale=0.4)
    data = h.data(TEXTS)
    found = h.run("eval", "style", "style+instruct", "--against", "base", "--data", data, "--json").json
    assert [row["stack"] for row in found["results"]] == ["style", "style+instruct", "base"]
    losses = {row["stack"]: row["loss"] for row in found["results"]}
    assert [(c["stack"], c["against"]) for c in found["comparisons"]] == [
        ("style", "base"), ("style+instruct", "base")
    ]  # fmt: skip
    for compared in found["comparisons"]:
        assert compared["difference"] == pytest.approx(losses[compared["stack"]] - losses["base"])
        assert compared["records"] == len(TEXTS)
        assert compared["p_value"] >= 2 / 2 ** len(TEXTS)
        assert compared["better"] is None, "five records can show nothing"
    text = h.run("eval", "style", "--against", "base", "--data", data).out
    assert "style and base: no difference that these 5 records can show" in text


def test_a_difference_that_is_no_noise_is_found(h: Any) -> None:
    h.train("style", "--max-steps", 30, "--learning-rate", 0.01, records=TEXTS)
    held = h.data(TEXTS * 2)
    found = h.run("eval", "base", "style", "--against", "base", "--data", held, "--json").json["comparisons"]
    itself, better = found
    assert (itself["difference"], itself["standard_error"], itself["p_value"], itself["better"]) == (0, 0, 1, None)
    assert better["better"] == "style"
    assert better["difference"] < -0.5
    assert better["p_value"] == pytest.approx(2 / 2**10), "every record is better, and of 1,024 ways two are as far"


def test_a_stack_against_itself_however_it_is_written(tiny_registry: Any) -> None:
    h = tiny_registry("gpt2")
    h.add("style", seed=1)
    found = h.run("eval", "style:1.0", "--against", "style@1", "--data", h.data(CHAT), "--json").json
    (compared,) = found["comparisons"]
    assert (compared["difference"], compared["p_value"]) == (0, 1)


def test_a_conversation_of_many_examples_is_one_record(h: Any) -> None:
    """This template renders a turn otherwise once another follows, so that each turn becomes an example of its own."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}(now) {% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = h.folder / "other"
    shutil.copytree(h.base, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    h.run("base", "add", "other", folder)
    ran = h.run("eval", "other", "--data", h.data(CHAT), "--json")
    assert "one example per turn" in ran.err
    assert ran.json["results"][0]["records"] == len(CHAT)


def test_records_with_nothing_to_learn_are_said_and_do_not_count(h: Any) -> None:
    long = {"prompt": "a" * 100, "completion": "b"}
    data = h.data([long, {"prompt": "a", "completion": "b"}])
    ran = h.run("eval", "base", "--data", data, "--max-length", 32, "--json")
    (row,) = ran.json["results"]
    assert (row["records"], row["tokens"], row["standard_error"]) == (1, 2, None)
    assert "1 of 2 records" in ran.err


@pytest.mark.parametrize(
    ("name", "shares"),
    [("llama", True), ("qwen3", True), ("gpt2", True), ("neox", True), ("mixtral", True), ("leaking", False)],
)
def test_a_record_scores_what_it_scores_alone(tiny_registry: Any, name: str, shares: bool) -> None:
    """Whatever else there is, in whatever order; where a model mixes the records of a row, none share one."""
    h = tiny_registry("llama" if name == "leaking" else name)
    stacked = h.load()
    if name == "leaking":
        inner = stacked.model.get_input_embeddings()
        inner.register_forward_hook(lambda _, __, output: output + 0.1 * output.cumsum(1))
    records = [{"text": text["text"] * times} for text in TEXTS for times in (1, 3, 7)]
    examples = encode(read_records(str(h.data(records))), stacked.tokenizer, EncodeOptions(600)).examples
    assert len(rows_of(examples)) < len(examples) / 2
    own = stacked.model.config._attn_implementation
    alone = [alone_score(stacked.model, example) for example in examples]
    passes: list[int] = []
    stacked.model.register_forward_hook(lambda *_: passes.append(1))

    def scored(given: Any) -> list[Any]:
        data = DataSet("data", given, list(range(len(given))))
        return Scoring(stacked, [data]).score("base")[0].records

    found = scored(examples)
    assert (len(passes) < len(examples)) == shares
    assert [score.loss for score in found] == pytest.approx([loss for loss, _ in alone], rel=1e-6)
    assert [score.correct for score in found] == [correct for _, correct in alone]
    assert scored(examples[::-1])[::-1] == found, "bit by bit"
    assert stacked.model.config._attn_implementation == own


def alone_score(model: Any, example: Any) -> tuple[float, int]:
    """By the model itself, without anything of ours: summed loss, and how many tokens were the most likely."""
    with torch.no_grad():
        log_shares = model(input_ids=torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
    asked = [(place - 1, label) for place, label in enumerate(example.labels) if place and label >= 0]
    loss = -sum(float(log_shares[place, label]) for place, label in asked)
    return loss, sum(int(log_shares[place].argmax()) == label for place, label in asked)


def test_a_row_has_a_bound_and_a_longer_record_stands_alone() -> None:
    lengths = [700, 100, 300, 5, 90, 512, 200, 7]
    rows = rows_of([Example([number] * length, [1] * length) for number, length in enumerate(lengths)])
    assert rows == [[0], [1, 2, 3, 4], [5], [6, 7]]
    assert all(len(row) == 1 or sum(lengths[n] for n in row) <= 512 for row in rows)


def test_what_records_begin_with_counts_once_in_a_row() -> None:
    question = list(range(400))
    answers = [[*question, *([number] * 30)] for number in (7, 3, 9, 1)]
    rows = rows_of([Example(ids, ids) for ids in [*answers, [999] * 10]])
    assert rows == [[3, 1, 0], [2, 4]]
