"""Objectives beside TRL's trainers: the same answers, adapter and settings give the same losses and the same factors.

The frozen stack is merged by hand for TRL, which is given that as the reference as well. Steps are of plain SGD over
all answers. TRL means over a micro-batch's tokens where the papers mean over answers, so that it gets one pair at a
time; its ORPO learns the prompt, too, so that prompts there have one token.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from tiny import random_adapter, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

from stackctl.engine.training import reference
from stackctl.engine.training.trainer import training_arguments

STEPS, RATE = 10, 0.05
PAIRS = [
    {"prompt": letter, "chosen": f" {word}" * (n + 1), "rejected": f" no {word}, and nothing else" * (1 + n % 2)}
    for n, (letter, word) in enumerate(zip("abcdef", ("red", "green", "blue", "black", "white", "grey"), strict=True))
]
LABELLED = [
    {"prompt": pair["prompt"] + kind, "completion": pair[kind], "label": kind == "chosen"}
    for pair in PAIRS
    for kind in ("chosen", "rejected")
]
_OWN = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.1}
_SIMPO = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5}
CASES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "dpo": (["--beta", 0.3], {"beta": 0.3}),
    "dpo smoothed": (
        ["--beta", 0.3, "--label-smoothing", 0.2],
        {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2},  # of one pair at a time it is conservative DPO
    ),
    "dpo with own loss": (["--sft-weight", 0.5], _OWN),
    "ipo": (["--beta", 0.4], {"loss_type": ["ipo"], "beta": 0.4}),
    "ipo with own loss": (["--sft-weight", 0.5], {**_OWN, "loss_type": ["ipo", "sft"]}),
    "kto": (["--beta", 0.5], {"beta": 0.5}),
    "orpo": (["--beta", 0.6], {"beta": 0.6}),
    "simpo": ([], {**_SIMPO, "cpo_alpha": 0.0}),
    "simpo with own loss": (["--sft-weight", 0.3], {**_SIMPO, "cpo_alpha": 0.3}),
}


def _trl(objective: str) -> tuple[type, type]:
    if objective == "kto":
        from trl import KTOConfig, KTOTrainer

        return KTOConfig, KTOTrainer
    if objective == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOConfig, ORPOTrainer
    if objective == "simpo":
        from trl.experimental.cpo import CPOConfig, CPOTrainer

        return CPOConfig, CPOTrainer
    from trl import DPOConfig, DPOTrainer

    return DPOConfig, DPOTrainer


def _train_with_trl(base: Path, frozen: Path, start: Path, folder: Path, case: str) -> tuple[float, dict[str, Tensor]]:
    """TRL's loss of the first step, and the factors after the last."""
    objective, settings = case.split()[0], CASES[case][1]
    config, trainer_class = _trl(objective)

    def merged() -> Any:
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), frozen).merge_and_unload()

    model = PeftModel.from_pretrained(merged(), start, is_trainable=True)
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None  # else some of its trainers put one before the prompt
    together = len(LABELLED) if objective == "kto" else 1  # KTO swaps answers inside a micro-batch
    arguments = config(
        output_dir=str(folder), per_device_train_batch_size=together, max_steps=STEPS, learning_rate=RATE,
        gradient_accumulation_steps=1 if objective == "kto" else len(PAIRS), optim="sgd", max_grad_norm=0,
        lr_scheduler_type="constant", bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    given = {"ref_model": merged()} if objective in ("dpo", "ipo", "kto") else {}
    data = Dataset.from_list(LABELLED if objective == "kto" else PAIRS)
    trainer = trainer_class(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, **given)
    losses: list[float] = []
    own = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = own(*args, **kwargs)
        losses.append(float(loss.detach()))
        return loss

    trainer.compute_loss = compute_loss
    trainer.train()
    first = losses[: 1 if objective == "kto" else len(PAIRS)]
    factors = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    return sum(first) / len(first), factors


@pytest.fixture
def plain_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer's optimizer for stackctl: what is compared is the gradient of each step, which Adam would hide."""

    def arguments(*args: Any, **kwargs: Any) -> Any:
        found = training_arguments(*args, **kwargs)
        found.optim, found.max_grad_norm = "sgd", 0
        return found

    monkeypatch.setattr("stackctl.engine.training.run.training_arguments", arguments)


@pytest.mark.usefixtures("plain_sgd")
@pytest.mark.parametrize("case", CASES)
def test_losses_and_factors_are_those_of_trl(h: Any, tmp_path: Path, case: str) -> None:
    objective, (flags, _) = case.split()[0], CASES[case]
    frozen = random_adapter(h.base, tmp_path / "frozen", seed=1, scale=0.1)
    start = random_adapter(h.base, tmp_path / "start", seed=2, scale=0.1)
    h.run("add", "one", frozen)
    h.run("add", "start", start, "--on", "one")
    data = tmp_path / "answers.jsonl"
    records = LABELLED if objective == "kto" else PAIRS
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    done = h.run(
        "train", "taste", "--on", "one", "--from", "start", "--data", data, "--objective", objective, *flags,
        "--batch-size", len(records), "--max-steps", STEPS, "--learning-rate", RATE, "--scheduler", "constant",
        "--warmup", 0, "--dtype", "float32", "--json",
    ).json  # fmt: skip
    log = [json.loads(line) for line in (Path(done["path"]) / "training_log.jsonl").read_text().splitlines()]
    loss, factors = _train_with_trl(h.base, frozen, start, tmp_path / "trl", case)
    assert log[0]["loss"] == pytest.approx(loss, abs=1e-5)
    before, after = (
        load_file(start / "adapter_model.safetensors"),
        load_file(Path(done["path"]) / "adapter_model.safetensors"),
    )
    assert set(after) == set(factors)
    for name, theirs in factors.items():
        moved = float((theirs - before[name]).abs().max())
        assert moved > 1e-4, name
        assert float((after[name] - theirs).abs().max()) <= 1e-4 * max(1.0, float(theirs.abs().max())), name
        assert float((after[name] - theirs).abs().max()) <= 0.02 * moved, name


def test_the_reference_is_raw_peft_with_all_members_live(
    h: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [random_adapter(h.base, tmp_path / name, seed=n, scale=0.1) for n, name in enumerate(("one", "two"), 1)]
    h.run("add", "one", members[0])
    h.run("add", "two", members[1], "--on", "one")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    seen: list[Any] = []
    own = reference.ReferenceModel.know

    @functools.wraps(own)
    def know(*args: Any, **kwargs: Any) -> Any:
        seen.append(own(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(reference.ReferenceModel, "know", know)
    args = ("--data", data, "--objective", "dpo", "--max-steps", 1, "--dtype", "float32")
    h.run("train", "taste", "--on", "one+two:0.7", *args)

    tokenizer = tiny_tokenizer()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(h.base), members[0])
    model.load_adapter(members[1], "two")
    model.base_model.set_adapter(["default", "two"])
    for module in model.modules():
        if isinstance(scaling := getattr(module, "scaling", None), dict) and "two" in scaling:
            scaling["two"] *= 0.7
    expected = []
    for pair in PAIRS:
        for answer in (pair["chosen"], pair["rejected"]):
            prompt, ids = (tokenizer(text)["input_ids"] for text in (pair["prompt"], answer))
            tokens = torch.tensor([[*prompt, *ids, tokenizer.eos_token_id]])
            with torch.no_grad():
                logs = model(input_ids=tokens).logits[0].log_softmax(-1)
            expected.append(float(sum(logs[n - 1, tokens[0, n]] for n in range(len(prompt), tokens.shape[1]))))
    assert list(seen[0].references) == pytest.approx(expected, rel=1e-5)
