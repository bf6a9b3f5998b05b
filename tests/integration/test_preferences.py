"""Objectives of pairs: by their formulas in float64, in whole runs on a frozen stack, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import made_of, tiny_tokenizer
from torch.nn.functional import logsigmoid
from transformers import GPTNeoConfig, OPTConfig

from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.loss.logits import without_noise
from stackctl.engine.training.objectives import OBJECTIVES, AnswerBatch, Strength, ranked
from stackctl.engine.training.reference import MismatchedAnswers

PAIRS = [
    {"prompt": f"Say {word}:", "chosen": f" {word}" * (n + 1), "rejected": f" no {word}, and nothing else"}
    for n, word in enumerate(("red", "green", "blue", "black", "white", "grey"))
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return path


LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[key], "label": key == "chosen"}
    for pair in PAIRS
    for key in ("chosen", "rejected")
]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in LABELLED))
    return path


def _log(done: dict[str, Any]) -> list[dict[str, float]]:
    return [json.loads(line) for line in (Path(done["path"]) / "training_log.jsonl").read_text().splitlines()]


def _answers() -> AnswerBatch:
    torch.manual_seed(0)
    given, reference = (-torch.rand(2, 10) * 9 - 1).unbind()
    return AnswerBatch(given, torch.arange(1.0, 11), reference, torch.tensor([True, False] * 5), torch.tensor(0.7))


def test_losses_are_those_of_the_papers_in_float64():
    a = _answers()
    found = {name: objective.loss(a, Strength(0.3)).tolist() for name, objective in OBJECTIVES.items()}
    sigmoid = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    odds = lambda x: math.exp(x) / (1 - math.exp(x))  # noqa: E731
    for i in range(0, 10, 2):
        (c, r), (nc, nr), (c0, r0) = (t[i : i + 2].tolist() for t in (a.given, a.tokens, a.reference))
        expected = {
            "dpo": -math.log(sigmoid(0.3 * ((c - c0) - (r - r0)))),
            "ipo": ((c - c0) / nc - (r - r0) / nr - 1 / 0.6) ** 2,
            "orpo": -c / nc - 0.3 * math.log(sigmoid(math.log(odds(c / nc) / odds(r / nr)))),
            "simpo": -math.log(sigmoid(0.3 * (c / nc - r / nr) - 0.5)),
        }
        assert {name: losses[i // 2] for name, losses in found.items() if name != "kto"} == pytest.approx(
            expected, rel=1e-5
        )
        kto = [1 - sigmoid(0.3 * (c - c0 - 0.7)), 1 - sigmoid(0.3 * (0.7 - (r - r0)))]
        assert found["kto"][i : i + 2] == pytest.approx(kto, rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "ipo", "simpo"])
def test_the_chosen_answers_own_loss_counts_by_its_weight(objective):
    a = _answers()
    without, with_it = (OBJECTIVES[objective].loss(a, Strength(0.3, sft_weight=weight)) for weight in (0.0, 0.4))
    torch.testing.assert_close(with_it - without, 0.4 * -a.given[::2] / a.tokens[::2])


def test_smoothing_takes_a_share_of_pairs_the_other_way_round():
    a = _answers()
    gains = a.given - a.reference
    h = 0.3 * (gains[::2] - gains[1::2])
    expected = -0.8 * logsigmoid(h) - 0.2 * logsigmoid(-h)
    torch.testing.assert_close(OBJECTIVES["dpo"].loss(a, Strength(0.3, 0.2)), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -3.0), (-3.0, 0.0), (-1e-6, -3.0), (-3.0, -1e-6)])
def test_an_answer_that_is_certain_has_a_loss_and_a_gradient(objective, chosen, rejected):
    exact = torch.tensor([chosen, rejected], dtype=torch.float64)
    given, reference = exact.float().requires_grad_(), torch.tensor([-1.0, -2.0])
    answers = AnswerBatch(given, torch.ones(2), reference, torch.tensor([True, False]), torch.tensor(0.0))
    loss = OBJECTIVES[objective].loss(answers, Strength(0.3)).sum()
    loss.backward()
    assert torch.isfinite(torch.stack([loss, *given.grad])).all()
    if objective == "orpo" and exact.max() < 0:
        odds = torch.log(exact.exp() / -torch.expm1(exact))
        assert float(loss.detach()) == pytest.approx(float(-exact[0] - 0.3 * logsigmoid(odds[0] - odds[1])), rel=1e-5)


def test_equal_answers_count_half():
    assert ranked(torch.tensor([2.0, 0.0, -1.0])).tolist() == [1.0, 0.5, 0.0]
    assert ranked(torch.tensor([2.0, 0.1, -0.1, -1.0]), torch.full((4,), 0.2)).tolist() == [1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize("objective", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("base", ["tied", "llama"])
def test_before_anything_is_learned_nothing_is_ranked(tiny_registry, tmp_path, objective, base):
    """The reference was scored in other rows, whose last places made 83% of pairs ranked rightly in a first step."""
    h = tiny_registry(base)
    h.add("style", seed=1)
    words = [chr(97 + n % 26) * (n % 7 + 1) for n in range(64)]
    text = [" ".join(words[n : n + 3 + n % 11]) for n in range(40)]
    if objective == "kto":
        records = [{"prompt": f"{n}:", "completion": text[n], "label": n % 3 == 0} for n in range(24)]
    else:
        records = [{"prompt": f"{n}:", "chosen": text[n], "rejected": text[39 - n]} for n in range(19)]
    args = ("--objective", objective, "--max-steps", 1, "--dtype", "float32", "--epochs", 1)
    assert h.train("new", *args, on="style", records=records)["accuracy"] == 0.5


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_to_rank_on_a_frozen_stack(h, data, objective):
    h.with_one()
    done = h.run(
        "train", "taste", "--on", "one", "--data", data, "--objective", objective, "--max-steps", 12,
        "--dtype", "float32", "--learning-rate", "1e-2", "--batch-size", 3, "--json",
    ).json  # fmt: skip
    assert (done["objective"], done["beta"]) == (objective, 2.0 if objective == "simpo" else 0.1)
    assert 0 <= done["accuracy"] <= 1
    log = _log(done)
    assert log[-1]["accuracy"] == 1
    assert log[-1]["margin"] > log[0]["margin"]
    if OBJECTIVES[objective].compares:
        assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    if objective == "dpo":
        assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_long_answers_are_compared_in_float64(h, tmp_path):
    """Thousands of nats, of which float32 sums leave 1e-4 of a step in which nothing was learned yet."""
    pairs = [{"prompt": "Go on:", "chosen": " red" * (100 + n), "rejected": " no" * (90 + n)} for n in range(3)]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    done = h.run(
        "train", "taste", "--base", "tiny", "--data", data, "--objective", "dpo", "--max-steps", 1, "--json",
        "--dtype", "float32", "--batch-size", 3,
    ).json  # fmt: skip
    first = _log(done)[0]
    assert -first["chosen_logp"] > 1000, "nats"
    assert first["margin"] == pytest.approx(0, abs=1e-9)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "objective", "differs"),
    [("gpt2", "dpo", False), ("gpt2", "kto", False), ("llama", "orpo", False), ("gpt2", "sft", True)],
)
def test_answers_are_compared_without_the_dropout_of_the_base(run, models, data, tmp_path, name, objective, differs):
    run("init")
    losses = []
    for base, share in (("plain", 0.0), ("noisy", 0.5)):
        folder = Path(shutil.copytree(models(name), tmp_path / base))
        config = json.loads((folder / "config.json").read_text())
        config |= {key: share for key in config if key.endswith(("_pdrop", "_dropout"))}
        (folder / "config.json").write_text(json.dumps(config))
        run("base", "add", base, folder)
        done = run(
            "train", f"on-{base}", "--base", base, "--data", data, "--objective", objective, "--max-steps", 2,
            "--dtype", "float32", "--learning-rate", "1e-2", "--json",
        ).json  # fmt: skip
        losses.append([step["loss"] for step in _log(done)])
    assert (losses[0] != losses[1]) is differs


@pytest.mark.parametrize(
    "config",
    [GPTNeoConfig(vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
                  attention_dropout=0.5, embed_dropout=0.5, resid_dropout=0.5),
     OPTConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16, dropout=0.5,
               word_embed_proj_dim=16, layerdrop=0.5)],
)  # fmt: skip
def test_noise_that_modules_read_in_their_configuration_is_switched_off(config):
    model, tokens = made_of(config), torch.arange(4, 24)[None]
    quiet = model.eval()(input_ids=tokens).logits
    assert not torch.equal(model.train()(input_ids=tokens).logits, quiet)
    without_noise(model)
    assert torch.equal(model(input_ids=tokens).logits, quiet)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_accumulation_and_layout_change_no_number(h, data, objective):
    losses = []
    for name, flags in (("a", ("--batch-size", 6)), ("b", ("--batch-size", 2, "--gradient-accumulation", 3))):
        args = ("--data", data, "--objective", objective, "--max-steps", 4, "--dtype", "float32", "--json")
        done = h.run("train", name, *args, *flags).json
        losses.append([step["loss"] for step in _log(done)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_a_run_that_begins_at_another_adapter_is_compared_with_the_frozen_stack_without_it(h, data):
    args = ("--data", data, "--objective", "dpo", "--dtype", "float32", "--learning-rate", "1e-2", "--json")
    h.run("train", "first", *args, "--max-steps", 6)
    done = h.run("train", "second", *args, "--max-steps", 1, "--from", "first").json
    assert done["margin"] > 0.01


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--beta", 1), "--beta"),
        (("--objective", "ipo", "--label-smoothing", 0.1), "--label-smoothing"),
        (("--objective", "kto", "--label-smoothing", 0.1), "--label-smoothing"),
        (("--objective", "dpo", "--pack"), "--pack"),
        (("--sft-weight", 1), "--sft-weight"),
        (("--objective", "orpo", "--sft-weight", 1), "--sft-weight"),
        (("--objective", "kto", "--sft-weight", 1), "--sft-weight"),
    ],
)
def test_what_has_no_meaning_together_is_refused(tiny_registry, data, flags, why):
    assert why in tiny_registry().run("train", "x", "--data", data, *flags, code=2).err


def test_an_objective_of_pairs_wants_pairs(tiny_registry, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n')
    ran = tiny_registry().run("train", "x", "--data", path, "--objective", "dpo", code=2)
    assert "takes pairs of answers" in ran.err


def test_a_frozen_stack_that_is_live_gives_the_run_of_one_that_is_folded(h, data):
    h.train("one", "--max-steps", 2, "--dtype", "float32")
    losses = []
    for name, frozen in (("a", "fold"), ("b", "live")):
        args = ("--on", "one", "--data", data, "--objective", "dpo", "--max-steps", 3, "--dtype", "float32", "--json")
        done = h.run("train", name, *args, "--frozen", frozen).json
        losses.append([step["loss"] for step in _log(done)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


# -- KTO -----------------------------------------------------------------------------------------------------------


def test_kto_learns_from_answers_with_labels(h, labelled):
    h.with_one()
    args = ("--on", "one", "--data", labelled, "--objective", "kto", "--dtype", "float32", "--learning-rate", "1e-2")
    done = h.run("train", "taste", *args, "--max-steps", 12, "--batch-size", 4, "--json").json
    assert (done["objective"], done["beta"]) == ("kto", 0.1)
    log = _log(done)
    assert log[0]["loss"] == pytest.approx(0.5, abs=1e-6)
    assert log[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert log[-1]["accuracy"] > 0.7
    assert log[-1]["loss"] < 0.5


def test_answers_with_labels_in_another_spelling_are_the_same_run(h, labelled, tmp_path):
    other = tmp_path / "labelled.csv"
    rows = [f'"{r["prompt"]}","{r["completion"]}",{r["label"]}' for r in LABELLED]
    other.write_text("\n".join(["prompt,completion,label", *rows, ""]))
    tags = tmp_path / "tags.jsonl"
    tags.write_text("".join(json.dumps({**r, "kto_tag": r["label"], "label": None}) + "\n" for r in LABELLED))
    losses = []
    for name, path in (("a", labelled), ("b", other), ("c", tags)):
        args = ("--objective", "kto", "--max-steps", 3, "--dtype", "float32", "--learning-rate", "1e-2", "--json")
        losses.append([step["loss"] for step in _log(h.run("train", name, "--data", path, *args).json)])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (1, "'label' is a number, no truth value"),
        ("yes", "'label' is a string, no truth value"),
        (None, "has no 'label'"),
    ],
)
def test_a_label_that_is_no_truth_value_is_named_by_line(tiny_registry, tmp_path, label, why):
    path = tmp_path / "bad.jsonl"
    records = [LABELLED[0], {**LABELLED[1], "label": label}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    ran = tiny_registry().run("train", "x", "--data", path, "--objective", "kto", code=2)
    assert f"line 2: {why}" in ran.err


def test_a_single_kind_of_label_is_said(tiny_registry, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in LABELLED[::2]))
    ran = tiny_registry().run("train", "x", "--data", path, "--objective", "kto", "--max-steps", 1)
    assert "every label is true" in ran.err


def test_text_has_no_answers_for_kto(tiny_registry, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": true}\n')
    assert (
        "takes answers with a label"
        in tiny_registry().run("train", "x", "--data", path, "--objective", "kto", code=2).err
    )


def test_an_answer_is_swapped_with_the_nearest_of_another_prompt():
    examples = [
        Example([p, p, a, a], [IGNORED, IGNORED, a, a]) for p, a in ((1, 11), (1, 12), (2, 13), (2, 14), (3, 15))
    ]
    mismatched = MismatchedAnswers(examples, 4)
    assert [example.input_ids for example in mismatched] == [
        [1, 1, 15, 15], [1, 1, 15, 15], [2, 2, 12, 12], [2, 2, 12, 12], [3, 3, 14, 14],
    ]  # fmt: skip
    assert [label for label in mismatched[0].labels if label != IGNORED] == [15, 15]
    assert [example.input_ids[2] for example in MismatchedAnswers(examples[:2], 4)] == [12, 11]
    assert MismatchedAnswers(examples, 3)[0].input_ids == [1, 1, 15]


# -- held-out answers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_held_out_answers_are_looked_at_while_training(h, data, objective):
    h.with_one()
    args = ("--on", "one", "--data", data, "--objective", objective, "--dtype", "float32", "--learning-rate", "1e-2")
    done = h.run("train", "taste", *args, "--max-steps", 10, "--eval-data", data, "--json").json
    looks = [point for point in _log(done) if "eval_loss" in point]
    assert looks[-1]["eval_accuracy"] == done["eval_accuracy"] == 1
    assert looks[-1]["eval_margin"] == done["eval_margin"] > looks[0]["eval_margin"]
    if OBJECTIVES[objective].compares:
        assert (looks[0]["eval_accuracy"], looks[0]["eval_margin"]) == (0.5, 0)
    if objective == "dpo":
        assert looks[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    before, after = looks[0]["eval_loss"], looks[-1]["eval_loss"]
    assert (done["eval_loss_before"], done["eval_loss"]) == (before, after)
    assert after < before


def test_held_out_records_of_another_kind_are_refused(tiny_registry, data, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a"}\n')
    ran = tiny_registry().run("train", "x", "--data", data, "--objective", "dpo", "--eval-data", path, code=2)
    assert f"takes pairs of answers, and {path} holds text" in ran.err


# -- eval ----------------------------------------------------------------------------------------------------------


def test_eval_ranks_pairs_compared_with_another_stack(tiny_registry, data, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    h = tiny_registry()
    h.train("one", "--max-steps", 2, "--dtype", "float32")
    args = ("--on", "one", "--data", data, "--objective", "dpo", "--dtype", "float32", "--learning-rate", "3e-3")
    path = Path(h.run("train", "taste", *args, "--max-steps", 3, "--json").json["path"])
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "abc"}\n{"text": "defg"}\n')
    found = h.run("eval", "one+taste", "base", "--data", text, "--data", data, "--against", "one", "--json").json
    rows = {(row["stack"], Path(row["data"]).name): row for row in found["results"]}
    assert [(row["stack"], row["data"]) for row in found["results"]] == [
        (stack, str(file)) for stack in ("one+taste", "base", "one") for file in (text, data)
    ]
    assert "margin" not in rows["base", "text.jsonl"]

    tokenizer = tiny_tokenizer()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(h.base), path.parent.parent / "one" / "1")
    model.load_adapter(path, "taste")

    def gaps(*active: str) -> list[float]:
        model.base_model.set_adapter(list(active))
        return [_log_p(model, tokenizer, p, p["chosen"]) - _log_p(model, tokenizer, p, p["rejected"]) for p in PAIRS]

    margins = torch.tensor([a - b for a, b in zip(gaps("default", "taste"), gaps("default"), strict=True)])
    row = rows["one+taste", "pairs.jsonl"]
    assert (row["against"], row["records"]) == ("one", 6)
    assert row["margin"] == pytest.approx(float(margins.mean()), abs=1e-4)
    assert row["margin_standard_error"] == pytest.approx(float(margins.std()) / math.sqrt(6), abs=1e-4)
    assert row["accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert row["accuracy_standard_error"] == pytest.approx(float((margins > 0).float().std()) / math.sqrt(6), abs=1e-6)
    itself = rows["one", "pairs.jsonl"]
    assert (itself["accuracy"], itself["margin"], itself["margin_standard_error"]) == (0.5, 0, 0)


def _log_p(model: Any, tokenizer: Any, pair: dict[str, str], answer: str) -> float:
    """By hand: the log-probability of an answer and its end of text."""
    prompt, ids = (tokenizer(text)["input_ids"] for text in (pair["prompt"], answer))
    tokens = torch.tensor([[*prompt, *ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        logs = model(input_ids=tokens).logits[0].double().log_softmax(-1)
    return float(sum(logs[n - 1, tokens[0, n]] for n in range(len(prompt), tokens.shape[1])))


def test_without_against_pairs_are_ranked_compared_with_the_base(h, data):
    h.train("one", "--max-steps", 2, "--dtype", "float32")
    found = h.run("eval", "one", "--data", data, "--json").json
    both = h.run("eval", "one", "base", "--data", data, "--json").json
    (row,) = found["results"]
    assert row["against"] == "base"
    assert row == both["results"][0]
    assert found["comparisons"] == []
    assert "compared with base" in " ".join(h.run("eval", "one", "--data", data).out.split())
