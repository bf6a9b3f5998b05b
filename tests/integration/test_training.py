"""Training on a frozen, active stack: against a plain loop on raw PEFT with all members live."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import distance, factors_of
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import CHATML
from tiny_registry import CHAT, TEXTS, interrupt
from transformers import AutoTokenizer

STEPS, RATE = 6, 0.003


def close(found: float, wanted: float, tolerance: float = 1e-4) -> bool:
    return abs(found - wanted) <= tolerance * abs(wanted)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_a_training_equals_a_plain_loop_with_style_active(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1, scale=0.2, lora_dropout=0.5)
    before = h.bytes_of("style")
    style = h.members(("style", 1))
    wanted, losses = oracle.train(h.base, style, CHAT, steps=STEPS, learning_rate=RATE)
    active, bare = oracle.loss(oracle.live(h.base, *style), CHAT), oracle.loss(oracle.live(h.base), CHAT)
    assert not close(active, bare, 0.01)
    found = {}
    for frozen in ("fold", "live"):
        report = h.train(frozen, "--frozen", frozen, "--max-steps", STEPS, on="style")
        curve = [point["loss"] for point in h.log(frozen)]
        assert close(curve[0], active), "style is active in the first forward pass"
        assert all(close(a, b) for a, b in zip(curve, losses, strict=True))
        found[frozen] = factors_of(h.weights(frozen))
        assert distance(found[frozen], wanted) < 1e-4
        assert set(found[frozen]) == set(wanted), "the new adapter is saved, and nothing else"
        assert all(path.is_file() for path in h.weights(frozen).iterdir())
        assert report["frozen"] == frozen
        assert report["on"] == ["style@1"]
        assert report["trainable_parameters"] == sum(factor.numel() for factor in wanted.values())
    assert distance(found["fold"], found["live"]) < 1e-4
    assert h.bytes_of("style") == before
    seed = oracle.initial_seed(0, style)
    ignored, _ = oracle.train(h.base, [], CHAT, steps=STEPS, learning_rate=RATE, seed=seed)
    assert distance(ignored, wanted) > 0.01, "without style it would be another adapter"


ON = {
    "a weight": ("style:0.5", [("style", 0.5)], {}),
    "a negative weight": ("style:-1.5", [("style", -1.5)], {}),
    "two members": ("style+tone:0.3", [("style", 1), ("tone", 0.3)], {}),
    "rslora": ("style", [("style", 1)], {"use_rslora": True, "r": 7}),
    "dropout": ("style", [("style", 1)], {"lora_dropout": 0.5}),
    "embedding and head": ("style", [("style", 1)], {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
}


@pytest.mark.parametrize("frozen", ["fold", "live"])
@pytest.mark.parametrize("case", ON)
def test_whatever_it_stands_on_is_active(tiny_registry: Any, case: str, frozen: str) -> None:
    h = tiny_registry("tied" if "head" in case else "llama")
    expression, members, config = ON[case]
    h.add("style", seed=1, **config)
    h.add("tone", seed=2, target_modules=["v_proj", "down_proj"], r=2)
    h.train("new", "--frozen", frozen, "--max-steps", 2, on=expression)
    plain, losses = oracle.train(h.base, h.members(*members), CHAT, steps=2, learning_rate=RATE)
    curve = [point["loss"] for point in h.log("new")]
    assert close(curve[0], losses[0])
    assert close(curve[1], losses[1])
    assert distance(factors_of(h.weights("new")), plain) < 1e-4
    assert not close(curve[0], oracle.loss(oracle.live(h.base), CHAT), 1e-3)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "neox", "mistral", "gemma"])
def test_documents_in_one_row_do_not_see_each_other(tiny_registry: Any, name: str) -> None:
    """The trap: in a row without padding, a document attends to the one before it unless something keeps them apart."""
    h = tiny_registry(name)
    wanted = oracle.loss(oracle.live(h.base), TEXTS)
    report = h.train("style", "--max-steps", 1, records=TEXTS)
    packed = h.train("packed", "--max-steps", 1, "--pack", "--max-length", 128, records=TEXTS)
    for found in (report, packed):
        assert close(found["loss"], wanted)
        assert found["frozen"] == "none"
        assert found["on"] == []
        assert found["supervised_tokens"] == oracle.supervised_count(TEXTS)
        assert found["tokens"] == oracle.token_count(TEXTS)
    ids, supervised = [], []
    for record in TEXTS:
        more, yes = oracle.label(record)
        ids += more
        supervised += [False, *yes[1:]]
    out = oracle.load_plain(h.base)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
    keep = torch.tensor(supervised[1:])
    joined = torch.nn.functional.cross_entropy(out[keep], torch.tensor(ids[1:])[keep])
    assert not close(float(joined.detach()), wanted, 1e-3), "seeing each other would show"


def test_the_json_counts_every_epoch_and_weighs_every_token_alike(h: Any) -> None:
    found = h.train("style", "--epochs", 3, "--batch-size", 2, "--learning-rate", 1e-12, records=TEXTS)
    assert found["steps"] == 9, "three steps an epoch, the last of them short"
    assert found["supervised_tokens"] == 3 * oracle.supervised_count(TEXTS)
    assert found["tokens"] == 3 * oracle.token_count(TEXTS)
    assert close(found["loss"], oracle.loss(oracle.live(h.base), TEXTS), 1e-6)
    assert found["tokens_per_second"] > 0
    assert [point["step"] for point in h.log("style")] == list(range(1, 10))
    mean_of_means = sum(point["loss"] for point in h.log("style")) / 9
    assert not close(found["loss"], mean_of_means, 1e-4)
    chat = h.train("chat", "--epochs", 2, records=CHAT)
    assert chat["supervised_tokens"] == 2 * oracle.supervised_count(CHAT)
    assert chat["tokens"] == 2 * oracle.token_count(CHAT)


def test_the_curve_tells_the_rate_of_each_step(h: Any) -> None:
    h.train("style", "--max-steps", 4, "--scheduler", "linear", "--learning-rate", 0.008, records=TEXTS)
    assert [point["learning_rate"] for point in h.log("style")] == pytest.approx([0.008, 0.006, 0.004, 0.002])
    tokens = oracle.token_count(TEXTS)
    assert [point["tokens"] for point in h.log("style")] == [tokens, 2 * tokens, 3 * tokens, 4 * tokens]


def test_accumulating_gradients_changes_nothing(h: Any) -> None:
    """The trap: a mean of means weighs a token by the length of its neighbours."""
    h.add("style", seed=1)
    records = [*CHAT, *CHAT[:3]]
    whole = h.train("whole", "--batch-size", 4, "--max-steps", 4, on="style", records=records)
    parts = h.train(
        "parts", "--batch-size", 2, "--gradient-accumulation", 2, "--max-steps", 4, on="style", records=records
    )
    singles = h.train(
        "singles", "--batch-size", 1, "--gradient-accumulation", 4, "--max-steps", 4, on="style", records=records
    )
    wanted = factors_of(h.weights("whole"))
    for name, report in (("parts", parts), ("singles", singles)):
        assert distance(factors_of(h.weights(name)), wanted) < 1e-5
        assert all(report[key] == whole[key] for key in ("steps", "tokens", "supervised_tokens"))
        assert close(report["loss"], whole["loss"], 1e-6)


def test_dropout_is_the_new_adapters_alone(h: Any) -> None:
    h.add("style", seed=1, lora_dropout=0.9)
    h.train("plain", "--max-steps", 2, on="style")
    h.train("noisy", "--max-steps", 2, "--dropout", 0.5, on="style")
    plain, noisy = ([point["loss"] for point in h.log(name)] for name in ("plain", "noisy"))
    # B is zero: what dropout does to A cannot show yet. Without dropout fused functions round in another way.
    assert plain[0] == pytest.approx(noisy[0], rel=1e-6)
    assert plain[1] != pytest.approx(noisy[1], rel=1e-5)


# -- what is registered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_checkpoint_is_plain_peft_at_its_root(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1)
    report = h.train("instruct", "--max-steps", 4, on="style")
    folder = h.weights("instruct")
    assert report["path"] == str(folder)
    alone = PeftModel.from_pretrained(oracle.load_plain(h.base), folder)
    assert not [n for n, p in alone.named_parameters() if p.isnan().any()]
    both = oracle.logits(oracle.live(h.base, *h.members(("style", 1)), (folder, 1)))
    assert oracle.relative(h.logits(h.load(), "style+instruct"), both, h.live()) < 1e-5
    only = oracle.logits(oracle.live(h.base, (folder, 1)))
    assert oracle.relative(oracle.logits(alone.double()), only, h.live()) < 1e-9
    assert float((only - h.live()).abs().max()) > 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == CHATML
    assert tokenizer("a b<|im_end|>")["input_ids"] == [*oracle.byte_ids("a b"), oracle.END]
    info = json.loads((folder / "adapter_info.json").read_text())
    entry = h.run("ls", "--json").json
    digests = {a["name"]: a["versions"][0]["digest"] for a in entry["adapters"]}
    assert info["base"] == "tiny"
    assert info["adapter"] == "instruct"
    assert [(m["adapter"], m["version"], m["digest"]) for m in info["trained_on"]] == [("style", 1, digests["style"])]
    assert info["usage"] == "stackctl generate style@1+instruct@1"
    assert report["digest"] == digests["instruct"]
    assert not list(folder.glob("*.bin"))
    assert not list(folder.glob("checkpoint-*"))
    assert h.adapters() == {"style", "instruct"}
    assert not (h.folder / "registry" / "runs" / "instruct").exists()
    assert h.run("verify", "--json").json["problems"] == []


def test_names_of_adapters_never_reach_peft(h: Any) -> None:
    """The trap: PEFT and stackctl use names of their own inside (default, frozen), and match by prefix."""
    h.train("frozen", "--max-steps", 2)
    on, members = "frozen", [(h.weights("frozen"), 1.0)]
    for name in ("default", "foo", "foobar", "keys"):
        wanted, losses = oracle.train(h.base, members, CHAT, steps=2, learning_rate=RATE)
        before = {member.parent.name: h.bytes_of(member.parent.name) for member, _ in members}
        h.train(name, "--frozen", "live", "--max-steps", 2, on=on)
        assert close(h.log(name)[0]["loss"], losses[0])
        assert distance(factors_of(h.weights(name)), wanted) < 1e-4
        assert before == {member: h.bytes_of(member) for member in before}
        on, members = f"{on}+{name}", [*members, (h.weights(name), 1.0)]


def test_held_out_data_changes_nothing_about_the_training(h: Any) -> None:
    h.add("style", seed=1)
    held_out = h.data(TEXTS, "held-out.jsonl")
    h.train("plain", "--max-steps", 3, "--dropout", 0.3, on="style")
    h.train("watched", "--max-steps", 3, "--dropout", 0.3, "--eval-data", held_out, on="style")
    plain, watched = (load_file(h.weights(name) / "adapter_model.safetensors") for name in ("plain", "watched"))
    assert all(torch.equal(plain[key], watched[key]) for key in plain)


# -- what is refused --------------------------------------------------------------------------------------------------


def flip_a_byte(path: Path) -> None:
    """Change a file in place, so that it looks unchanged by size and time."""
    known = path.stat()
    with path.open("r+b") as stream:
        stream.seek(-2, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-2, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))
    os.utime(path, ns=(known.st_atime_ns, known.st_mtime_ns))


@pytest.mark.parametrize("frozen", ["fold", "live"])
def test_frozen_files_that_change_are_5(h: Any, frozen: str) -> None:
    h.add("style", seed=1)
    file = h.weights("style") / "adapter_model.safetensors"
    h.at_step(2, lambda: flip_a_byte(file))
    error = h.train("instruct", "--frozen", frozen, "--max-steps", 3, on="style", code=5)
    assert error["error"]["code"] == "verification_failed"
    assert h.adapters() == {"style"}
    assert h.run("verify", "--json", code=None).json["problems"]
    h.train("instruct", "--frozen", frozen, "--max-steps", 3, on="style", code=5)
    assert h.adapters() == {"style"}
    flip_a_byte(file)
    h.at_step(0, interrupt)
    h.train("instruct", "--frozen", frozen, "--max-steps", 3, on="style")
    assert h.adapters() == {"style", "instruct"}


@pytest.mark.parametrize("frozen", ["auto", "fold", "live"])
def test_a_stack_without_effect_is_5(h: Any, frozen: str) -> None:
    h.add("style", seed=1)
    h.train("instruct", "--frozen", frozen, "--max-steps", 2, on="style:0", code=5)
    nothing = h.add("nothing", seed=2, scale=0.0)
    assert not any(t.any() for t in factors_of(nothing).values())
    h.train("instruct", "--frozen", frozen, "--max-steps", 2, on="nothing", code=5)
    assert h.adapters() == {"style", "nothing"}


def test_a_loss_that_is_no_number_is_1(h: Any) -> None:
    h.add("style", seed=1)
    handler = signal.getsignal(signal.SIGINT)
    h.train("instruct", "--learning-rate", 1e30, "--max-steps", 5, on="style", code=1)
    assert h.adapters() == {"style"}
    assert signal.getsignal(signal.SIGINT) is handler, "Ctrl-C is as it was"


def test_a_frozen_member_with_nan_is_5(h: Any, tmp_path: Path) -> None:
    h.add("style", seed=1)
    tensors = load_file(h.paths["style"] / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("inf")
    save_file(tensors, h.paths["style"] / "adapter_model.safetensors", {"format": "pt"})
    if h.run("add", "sick", h.paths["style"], code=None).code == 0:
        h.train("instruct", "--max-steps", 2, on="sick", code=5)
        assert "instruct" not in h.adapters()


def test_wrong_usage_is_told_at_once(h: Any) -> None:
    h.add("style", seed=1)
    data = h.data()
    typo = h.run("train", "new", "--data", data, "--target-modules", "q_proj,v_prj", "--json", code=2).json["error"]
    assert "v_prj" in typo["message"]
    assert "v_proj" in typo["hint"]
    h.run("train", "style", "--on", "style", "--data", data, code=2)
    h.run("train", "new", "--data", "nowhere.jsonl", code=3)
    h.run("train", "new", "--on", "styl", "--data", data, code=3)
    h.run("train", "new", code=2)
    every = h.run(
        "train", "style", "--on", "style", "--data", "nowhere.jsonl", "--target-modules", "q_prj", "--json", code=None
    )
    assert every.code in (2, 3)
    for part in ("nowhere.jsonl", "itself", "q_prj"):
        assert part in every.json["error"]["message"]
    assert h.adapters() == {"style"}
