"""``--train-tokens``: rows of single tokens learn beside the factors, as raw PEFT trains them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import untrained_base
from tiny_registry import CHAT, interrupt
from transformers import set_seed

END, START = "<|im_end|>", "<|im_start|>"
ROWS = ("--train-tokens", f"{START},{END}")
NUMBERS = [256, 257]


def peft_training(
    base: Path, frozen: Sequence[Path], steps: int, modules: Sequence[str], learning_rate: float = 0.003
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """A plain loop: what is frozen merged into the base by PEFT, and one adapter with rows of single tokens on it."""
    model: Any = oracle.load_plain(base)
    for path in frozen:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    set_seed(oracle.initial_seed(0, [(path, 1.0) for path in frozen]))
    rows = dict.fromkeys(modules, NUMBERS)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=rows
    )
    peft = get_peft_model(model, config).train()
    parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        total = torch.stack([oracle.loss_sum(peft, record) for record in CHAT]).sum() / oracle.supervised_count(CHAT)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    named = {n.replace(".default", ""): p.detach().double() for n, p in peft.named_parameters() if p.requires_grad}
    return named, losses


@pytest.mark.parametrize("frozen", ["none", "fold", "live"])
@pytest.mark.parametrize("kind", ["llama", "tied", "gemma", "gpt2", "neox"])
def test_a_run_is_pefts_own(tiny_registry: Any, kind: str, frozen: str) -> None:
    h = tiny_registry(kind)
    on: dict[str, Any] = {} if frozen == "none" else {"on": "style"}
    tied = kind in ("tied", "gemma", "gpt2")
    embedding = {"gpt2": "transformer.wte", "neox": "gpt_neox.embed_in"}.get(kind, "model.embed_tokens")
    head = "lm_head"
    if on:
        h.add("style", seed=1, trainable_token_indices={embedding: [3, 104], **({} if tied else {head: [3, 105]})})
    given = () if frozen == "none" else ("--frozen", frozen)
    told = h.train("new", *ROWS, "--max-steps", 4, *given, **on)
    assert told["trained_tokens"] == [START, END]
    assert told["frozen"] == frozen
    below = [h.paths["style"]] if on else []
    wanted, losses = peft_training(h.base, below, 4, [embedding] if tied else [embedding, head])
    assert [point["loss"] for point in h.log("new")] == pytest.approx(losses, rel=2e-5)
    found = oracle.factors_of(h.weights("new"))
    assert oracle.distance(found, wanted) < 1e-3
    start = oracle.load_plain(h.base).get_input_embeddings().weight[NUMBERS].detach().double()
    for name in (name for name in wanted if "trainable_tokens" in name):
        moved = start if "embed" in name or "wte" in name else None
        gap = (found[name] - wanted[name]).norm() / ((wanted[name] - moved).norm() if moved is not None else 1)
        assert float(gap) < 1e-3
    # what was saved is what the stack makes of it
    model: Any = oracle.load_plain(h.base)
    for path in [*below, h.weights("new")]:
        model = PeftModel.from_pretrained(model, path).merge_and_unload()
    tokens = torch.tensor([[3, 104, 105, *NUMBERS, 60, 70]])
    stacked = h.load()
    stacked.use(h.plan("style+new" if on else "new").check())
    bare = oracle.logits(oracle.load_plain(h.base), tokens)
    assert oracle.relative(oracle.logits(stacked.model, tokens), oracle.logits(model, tokens), bare) < 1e-4
    config = json.loads((h.weights("new") / "adapter_config.json").read_text())
    assert all(indices == NUMBERS for indices in config["trainable_token_indices"].values())
    entry = h.run("inspect", "new", "--json").json
    assert entry["trained_tokens"] == [START, END]
    assert {row["module"] for row in entry["token_rows"]} == {embedding, head}


def generated(h: Any, name: str) -> Any:
    return h.run("generate", name, "-p", "Hi", "--max-new-tokens", 16, "--json").json


def test_auto_learns_to_stop(run: Any, tmp_path: Path) -> None:
    """On a base whose rows of the template's tokens are as they were initialised, which a LoRA alone cannot mend."""
    run("init")
    run("base", "add", "b", untrained_base(tmp_path / "model", learned=False))
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}] * 4
    data = oracle.write_jsonl(tmp_path / "chat.jsonl", chat)
    common = ("--base", "b", "--data", data, "--max-steps", 60, "--learning-rate", 1e-2, "--scheduler", "constant",
              "--warmup", 0, "--rank", 4)  # fmt: skip
    without = run("train", "without", *common)
    assert "--train-tokens auto does" in " ".join(without.err.split())
    ran = run("train", "with", *common, "--train-tokens", "auto", "--json")
    assert ran.json["trained_tokens"] == [START, END]
    assert "never learned" not in ran.err
    ends = {}
    for name in ("with", "without"):
        found = run("generate", name, "-p", "Hi", "--max-new-tokens", 16, "--json").json
        ends[name] = (found["text"], found["stop"])
    assert ends["with"] == ("Yes.", "end")
    assert ends["without"][1] == "length"
    # on top of it those tokens are learned already, and are left alone
    ran = run("train", "more", *common[2:], "--on", "with", "--train-tokens", "auto", "--max-steps", 1, "--json")
    assert ran.json["trained_tokens"] == []
    assert "has trained <|im_start|>, <|im_end|> already" in ran.err
    assert "never learned" not in ran.err


def test_the_dry_run_says_what_it_would_train(h: Any) -> None:
    ran = h.run("train", "new", "--data", h.data(), *ROWS, "--dry-run", "--json").json
    assert ran["trained_tokens"] == [START, END]
    plain = h.run("train", "new", "--data", h.data(), "--dry-run", "--json").json
    assert plain["trained_tokens"] == []
    assert plain["settings"]["train_tokens"] == "none"
    rows, width = 2 * 2, 32
    assert ran["memory"]["adapter"] - plain["memory"]["adapter"] == rows * width * 4
    assert ran["memory"]["logits"] - plain["memory"]["logits"] == 260 * width * 4
    text = h.run("train", "new", "--data", h.data(), *ROWS, "--dry-run").out
    assert "trains the rows of <|im_start|> (256), <|im_end|> (257) in embed_tokens, lm_head" in text
    auto = h.run("train", "new", "--data", h.data(), "--train-tokens", "auto", "--dry-run", "--json")
    assert auto.json["trained_tokens"] == []
    assert "finds none" in auto.err


def test_a_resumed_run_goes_on_with_its_rows(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    options = (*ROWS, "--max-steps", 6, "--save-steps", 2)
    h.train("whole", *options)
    h.at_step(4, interrupt)
    h.train("new", *options, code=130)
    h.at_step(0, interrupt)
    assert "train_tokens" in h.train("new", "--max-steps", 6, "--save-steps", 2, "--resume", code=2)["error"]["message"]
    h.train("new", *options, "--resume")
    new, whole = (load_file(h.weights(name) / "adapter_model.safetensors") for name in ("new", "whole"))
    assert new.keys() == whole.keys()
    assert all(torch.equal(new[name], whole[name]) for name in whole)


@pytest.mark.usefixtures("forked_ranks")
def test_best_weights_pairs_and_two_processes(tiny_registry: Any, tmp_path: Path) -> None:
    h = tiny_registry("tied")
    held_out = h.data(CHAT[:2], "held.jsonl")
    kept = h.train("kept", *ROWS, "--max-steps", 4, "--eval-data", held_out, "--eval-steps", 1, "--learning-rate", 0.3)
    again = h.run("eval", "kept", "--data", held_out, "--json").json["results"][0]["loss"]
    assert again == pytest.approx(kept["eval_loss"], rel=1e-5)
    one = h.train("one", *ROWS, "--max-steps", 3, "--batch-size", 4, records=CHAT[:4])
    two = h.train("two", *ROWS, "--max-steps", 3, "--batch-size", 2, "--num-processes", 2, records=CHAT[:4])
    assert two["processes"] == 2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    pairs = [{"prompt": f"Say {w}:", "chosen": f" {w}", "rejected": f" no {w}"} for w in ("red", "green", "blue")]
    data = oracle.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    ran = h.run("train", "dpo", "--data", data, *ROWS, "--objective", "dpo", "--max-steps", 2, "--json").json
    assert ran["trained_tokens"] == [START, END]


def test_beginning_at_another_ones_rows(h: Any) -> None:
    h.train("first", *ROWS, "--max-steps", 3, "--learning-rate", 0.05)
    end = h.run("eval", "first", "--data", h.data(), "--json").json["results"][0]["loss"]
    told = h.train("more", "--from", "first", "--train-tokens", "a", "--max-steps", 1)
    assert told["trained_tokens"] == ["a", START, END]
    assert h.log("more")[0]["loss"] == pytest.approx(end, rel=1e-5)
    again = h.train("again", "--from", "first", "--max-steps", 1)
    assert again["trained_tokens"] == [START, END]
    assert h.log("again")[0]["loss"] == pytest.approx(end, rel=1e-5)
    error = h.train("over", "--from", "first", "--max-steps", 1, on="again", code=4)["error"]
    assert "again@1 has trained" in error["message"]


def test_half_a_base_has_rows_in_float32(tiny_registry: Any) -> None:
    h = tiny_registry("tied", dtype=torch.bfloat16)
    h.train("new", *ROWS, "--dtype", "bfloat16", "--max-steps", 2)
    (rows,) = (t for n, t in load_file(h.weights("new") / "adapter_model.safetensors").items() if "trainable" in n)
    assert rows.dtype == torch.float32


@pytest.mark.parametrize("options", [("--gradient-checkpointing",), ("--pack", "--max-length", 64), ("--dropout", 0.1)])
def test_rows_learn_however_it_is_trained(h: Any, options: tuple[object, ...]) -> None:
    texts = [{"text": f"{n}. A tide, and a lamp."} for n in range(6)]
    h.train("new", *ROWS, *options, "--max-steps", 2, records=texts if "--pack" in options else CHAT)
    rows = load_file(h.weights("new") / "adapter_model.safetensors")
    head = rows["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    assert (head - oracle.load_plain(h.base).get_output_embeddings().weight[NUMBERS]).norm(dim=1).min() > 1e-4


def test_what_cannot_be_trained_is_refused_by_name(h: Any) -> None:
    h.add("style", seed=1, trainable_token_indices=NUMBERS)
    h.add("lora", seed=2, target_modules=["q_proj", "lm_head"])
    h.add("whole", seed=3, modules_to_save=["embed_tokens"])
    cases: list[tuple[tuple[object, ...], str | None, int, str]] = [
        (("--train-tokens", "nosuchtoken,<|im_ent|>"), None, 2, "'nosuchtoken' is not a single token"),
        (("--train-tokens", "nosuchtoken,<|im_ent|>"), None, 2, "'<|im_ent|>' is not a single token"),
        (("--train-tokens", ","), None, 2, "names no token"),
        (ROWS, "style", 4, "style@1 has trained <|im_start|>"),
        (ROWS, "lora", 4, "lora@1"),
        (ROWS, "whole", 4, "whole@1"),
        ((*ROWS, "--target-modules", "q_proj,embed_tokens"), None, 2, "embed_tokens"),
        ((*ROWS, "--target-modules", "q_proj,lm_head"), None, 2, "lm_head"),
    ]
    for options, on, code, said in cases:
        error = h.train("new", *options, "--max-steps", 1, on=on, code=code)["error"]
        assert said in error["message"]
        assert error["hint"]
    config = h.folder / "fsdp.yaml"
    config.write_text("distributed_type: FSDP\nnum_processes: 2\nfsdp_config: {fsdp_version: 2}\n")
    assert "FSDP" in h.train("new", *ROWS, "--accelerate-config", config, code=2)["error"]["message"]
    assert h.adapters() == {"style", "lora", "whole"}


def test_a_recipe_names_tokens_and_is_up_to_date(h: Any) -> None:
    h.data()
    recipe = h.folder / "stackctl.yaml"
    text = "base: tiny\ntrain:\n  chat: {data: data.jsonl, max_steps: 1, rank: 2, train_tokens: %s}\n"
    recipe.write_text(text % "[<|im_end|>, <|im_start|>]")
    assert h.run("train", "--json").json["built"][0]["trained_tokens"] == [START, END]
    recipe.write_text(text % "'<|im_start|>,<|im_end|>'")
    assert h.run("train", "--json").json["built"] == []
    recipe.write_text(text % "none")
    assert h.run("train", "--dry-run", "--json").json["plan"][0]["why"] == "other train_tokens"


def test_a_token_is_named_as_it_is_written(h: Any) -> None:
    """By its name in the vocabulary, or by the text that it stands for."""
    for asked, name in (("Ġ", "Ġ"), (" ", " "), ("a, b", None)):
        found = h.run("train", "new", "--data", h.data(), "--train-tokens", asked, "--dry-run", "--json").json
        assert found["trained_tokens"] == ([name] if name else ["a", " b"])


def test_a_frozen_stack_with_rows_can_be_weighted(tiny_registry: Any) -> None:
    h = tiny_registry("tied")
    h.add("style", seed=1, trainable_token_indices=[3, 104])
    for how in ("fold", "live"):
        h.train(f"new-{how}", *ROWS, "--max-steps", 2, "--frozen", how, on="style:0.5")
        loss = h.run("eval", "style:0.5", "--data", h.data(), "--json").json["results"][0]["loss"]
        assert h.log(f"new-{how}")[0]["loss"] == pytest.approx(loss, rel=1e-5)
