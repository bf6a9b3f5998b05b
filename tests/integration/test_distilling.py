"""Distilling: the divergence against raw transformers and PEFT in float64, whole runs, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import CHATML, tiny_tokenizer
from tiny_registry import CHAT, TEXTS, interrupt
from transformers import AutoModelForCausalLM, LlamaConfig

from stackctl.engine.data.examples import Example
from stackctl.engine.data.layouts import behind_system
from stackctl.engine.data.rows import TaughtExamples, collate
from stackctl.engine.loss import token_losses as chunks
from stackctl.engine.records.types import ChatRecord
from stackctl.engine.training.teaching import Teaching

SYSTEM = "Answer like a pirate."
TALKS = CHAT[:4]
STILL = ("--max-steps", 1, "--learning-rate", 1e-30)
SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def two_in_one(targets: list[str], *, zero: bool = False) -> Any:
    """A small model with a new adapter and a teacher's, of which the first is active."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    kind = {} if zero else {"init_lora_weights": False}
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, **kind))
    adapted.add_adapter("frozen", LoraConfig(r=3, target_modules=targets, init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and not zero:
                parameter.normal_(std=0.4)
    adapted.set_adapter("default")
    return adapted


def micro_batch(*, behind: int = 0) -> dict[str, torch.Tensor]:
    """Two records in a row, the teacher's behind so many tokens more."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length in (11, 6):
        ids = torch.randint(3, 90, (length,), generator=generator).tolist()
        own = Example(ids, [-100] * 3 + ids[3:])
        more = [5, 7, 9, 4][:behind]
        examples += [own, Example(more + ids, [-100] * len(more) + own.labels)]
    return collate(list(TaughtExamples(examples)))


def rows_of(batch: dict[str, torch.Tensor], prefix: str = "") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each record of a micro-batch: its tokens (1, T) and the places that predict a label."""
    starts = [
        *torch.nonzero(batch[f"{prefix}position_ids"][0] == 0).flatten().tolist(),
        batch[f"{prefix}input_ids"].numel(),
    ]
    keep = batch[f"{prefix}keep"]
    return [
        (batch[f"{prefix}input_ids"][:, a:b], keep[(keep >= a) & (keep < b)] - a) for a, b in itertools.pairwise(starts)
    ]


def wanted_divergences(adapted: Any, batch: dict[str, torch.Tensor], teacher: str | None) -> torch.Tensor:
    """By raw PEFT, record by record."""
    found = []
    for (own, keep), (theirs, their_keep) in zip(rows_of(batch), rows_of(batch, "teacher_"), strict=True):
        with torch.no_grad():
            if teacher is None:
                with adapted.disable_adapter():
                    p = adapted(theirs).logits[0, their_keep].log_softmax(-1)
            else:
                adapted.set_adapter(teacher)
                p = adapted(theirs).logits[0, their_keep].log_softmax(-1)
        adapted.set_adapter("default")
        q = adapted(own).logits[0, keep].log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(found)


@pytest.mark.parametrize("one_by_one", [False, True], ids=["row", "one by one"])
@pytest.mark.parametrize("behind", [0, 4])
@pytest.mark.parametrize("teacher", ["frozen", None])
@pytest.mark.parametrize(
    "targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"]], ids=["frozen head", "on the head"]
)
def test_divergence_and_gradient_are_those_of_peft_in_float64(
    monkeypatch: pytest.MonkeyPatch, targets: list[str], teacher: str | None, behind: int, one_by_one: bool
) -> None:
    monkeypatch.setattr(chunks, "LOSS_CHUNK", 3 * 4 * SIZES["vocab_size"])  # three tokens a chunk
    adapted, batch = two_in_one(targets), micro_batch(behind=behind)
    exact = copy.deepcopy(adapted).double()
    weights = torch.linspace(0.5, 2, batch["labels"].numel())
    found = Teaching(adapted, teacher, "it").divergences(adapted, batch, one_by_one=one_by_one)
    wanted = wanted_divergences(exact, batch, teacher)
    assert float(wanted.detach().min()) > 1e-4, "there is something to tell apart"
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-6)
    names = [name for name, p in exact.named_parameters() if p.requires_grad]
    assert names == [name for name, p in adapted.named_parameters() if p.requires_grad], "the teacher learns nothing"
    assert all(".default." in name for name in names)
    (found * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    for name in names:
        own, true = adapted.get_parameter(name).grad.double(), exact.get_parameter(name).grad
        assert float((own - true).abs().max()) <= 1e-4 * float(true.abs().max()), name


def test_a_teacher_that_says_the_same_teaches_nothing() -> None:
    adapted, batch = two_in_one(["q_proj", "lm_head"], zero=True), micro_batch()
    found = Teaching(adapted, None, "base").divergences(adapted, batch)
    found.sum().backward()
    assert float(found.detach().abs().max()) < 1e-6
    assert all(float(p.grad.abs().max()) < 1e-6 for p in adapted.parameters() if p.requires_grad)


def divergence(teacher: Any, student: Any, records: list[dict[str, Any]], system: str | None = None) -> float:
    """The mean over supervised tokens, with what the teacher reads rendered by transformers."""
    tokenizer = tiny_tokenizer()
    total, count = 0.0, 0
    for record in records:
        ids, learned = oracle.label(record)
        theirs, more = ids, 0
        if system:
            messages = [{"role": "system", "content": system}, *record["messages"]]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
            more = len(tokenizer.apply_chat_template(messages[:1], tokenize=True, return_dict=False))
            assert theirs[more : more + len(ids)] == ids
        places = [n for n, yes in enumerate(learned) if yes and n]
        with torch.no_grad():
            p = teacher(torch.tensor([theirs])).logits[0, [more + n - 1 for n in places]].double().log_softmax(-1)
            q = student(torch.tensor([ids])).logits[0, [n - 1 for n in places]].double().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
        count += len(places)
    return total / count


def cut(base: Path, members: list[oracle.Member], rank: int) -> Any:
    """The base in float64 with the sum of some members in it, each layer's cut to a rank by a whole SVD."""
    model = oracle.load_plain(base).double()
    total = oracle.added(*(oracle.deltas(path, weight) for path, weight in members))
    with torch.no_grad():
        for name, delta in total.items():
            u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
            weight = model.get_submodule(name.removeprefix("base_model.model.")).weight
            weight += (u[:, :rank] * s[:rank]) @ vh[:rank]
    return model


def distil(h: Any, what: str, *options: object, records: Any = CHAT, held_out: Any = CHAT, code: int = 0) -> Any:
    data, held = h.data(records, "taught.jsonl"), h.data(held_out, "held.jsonl")
    plain = ("--name", "one", "--data", data, "--eval-data", held, "--batch-size", len(records), "--dtype", "float32")
    return h.run("distil", what, *plain, *options, "--json", code=code)


def two(h: Any) -> list[oracle.Member]:
    h.add("style", seed=1)
    h.add("chat", seed=2, target_modules=["q_proj", "v_proj", "down_proj"])
    return h.members(("style", 0.7), ("chat", 1.0))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_rank_that_suffices_begins_where_the_stack_is(tiny_registry: Any, kind: str) -> None:
    h = tiny_registry(kind)
    h.add("style", seed=1)
    h.add("chat", seed=2)
    done = distil(h, "style:0.7+chat", "--rank", 8, *STILL).json
    assert done["distilled"]["divergence_before"] < 1e-6
    assert (done["base"], done["on"], done["objective"]) == ("tiny", [], "distil")
    assert done["distilled"]["teacher"] == "style@1:0.7+chat@1"
    stacked = h.load()
    theirs, own, bare = h.logits(stacked, "style:0.7+chat"), h.logits(stacked, "one"), h.logits(stacked, "base")
    assert oracle.relative(own, theirs, bare) < 1e-4


def test_a_smaller_rank_begins_at_the_best_pair_and_comes_nearer(h: Any) -> None:
    members = two(h)
    done = distil(h, "style:0.7+chat", "--rank", 2, "--max-steps", 12, "--learning-rate", 3e-3).json
    found = done["distilled"]
    teacher, student = oracle.live(h.base, *members), cut(h.base, members, 2)
    assert found["divergence_before"] == pytest.approx(divergence(teacher, student, CHAT), rel=1e-4)
    assert found["loss_before"] == pytest.approx(oracle.loss(student, CHAT), rel=1e-4)
    made = oracle.live(h.base, (h.weights("one"), 1.0))
    assert found["divergence"] == pytest.approx(divergence(teacher, made, CHAT), rel=1e-4)
    assert found["loss"] == pytest.approx(oracle.loss(made, CHAT), rel=1e-4)
    assert found["divergence"] < 0.7 * found["divergence_before"]
    assert found["divergence_error"] > 0
    assert done["loss"] == pytest.approx(sum(p["loss"] for p in h.log("one") if "loss" in p) / 12, rel=1e-5)
    assert h.log("one")[0]["step"] == 0
    assert {"system": None, **h.run("inspect", "one", "--json").json["distilled"]} == found


def test_the_error_is_that_of_ratios_over_records(tiny_registry: Any) -> None:
    from stackctl.engine.evaluation.significance import ratio_error

    h = tiny_registry()
    members = two(h)
    found = distil(h, "style:0.7+chat", "--rank", 2, *STILL).json["distilled"]
    teacher, student = oracle.live(h.base, *members), cut(h.base, members, 2)
    sizes = [oracle.supervised_count([record]) for record in CHAT]
    totals = [divergence(teacher, student, [record]) * size for record, size in zip(CHAT, sizes, strict=True)]
    assert found["divergence_before_error"] == pytest.approx(ratio_error(totals, sizes), rel=1e-3)


def test_weights_that_only_got_worse_are_not_taken(h: Any) -> None:
    two(h)
    done = distil(h, "style+chat", "--rank", 2, "--max-steps", 2, "--learning-rate", 3.0).json
    assert done["kept_step"] == 0
    assert done["distilled"]["divergence"] == done["distilled"]["divergence_before"]


@pytest.mark.parametrize("stack", ["base", "style"])
def test_a_system_prompt_is_read_by_the_teacher_alone(h: Any, stack: str) -> None:
    h.add("style", seed=1)
    (h.folder / "pirate.txt").write_text(SYSTEM + "\n")
    members = h.members(("style", 1.0)) if stack == "style" else []
    options = ("--system", "pirate.txt", "--rank", 4, "--max-steps", 12, "--learning-rate", 1e-2)
    done = distil(h, stack, *options, records=TALKS, held_out=TALKS).json
    teacher = oracle.live(h.base, *members)
    found = done["distilled"]
    assert found["divergence_before"] == pytest.approx(divergence(teacher, teacher, TALKS, SYSTEM), rel=1e-4)
    made = oracle.live(h.base, (h.weights("one"), 1.0))
    assert found["divergence"] == pytest.approx(divergence(teacher, made, TALKS, SYSTEM), rel=1e-4)
    assert found["divergence"] < 0.7 * found["divergence_before"]
    assert done["tokens"] == 12 * oracle.token_count(TALKS), "the teacher's own tokens do not count"


def test_a_records_own_system_message_follows_the_prompt() -> None:
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    found = behind_system(ChatRecord(1, said, context=1, muted=frozenset()), "Be brief.")
    assert found.messages == [{"role": "system", "content": "Be brief.\n\nBe kind."}, said[1]]
    plain = behind_system(ChatRecord(1, said[1:], context=1, muted=frozenset({0})), "Be brief.")
    assert (plain.messages[0]["role"], plain.context, plain.muted) == ("system", 2, {1})


def test_it_is_cut_to_a_length_as_ever_and_texts_teach_too(h: Any) -> None:
    h.add("style", seed=1)
    done = distil(h, "style", "--rank", 2, "--pack", "--max-length", 24, *STILL, records=TEXTS, held_out=TEXTS).json
    assert done["distilled"]["divergence_before"] > 0
    (h.folder / "pirate.txt").write_text(SYSTEM)
    options = ("--system", "pirate.txt", "--rank", 2, "--max-length", 60, *STILL)
    assert distil(h, "style", *options, records=TALKS, held_out=TALKS).json["version"] == 2


def test_an_interrupted_run_goes_on_to_the_same_weights(h: Any) -> None:
    two(h)
    options = ("--rank", 2, "--max-steps", 6, "--save-steps", 2, "--learning-rate", 1e-3)
    whole = distil(h, "style+chat", *options).json["digest"]
    h.run("rm", "one")
    h.at_step(3, interrupt)
    distil(h, "style+chat", *options, code=130)
    h.at_steps({})
    changed = distil(h, "style:0.5+chat", *options, "--resume", code=2)
    assert "teacher" in changed.json["error"]["message"]
    assert distil(h, "style+chat", *options, "--resume").json["digest"] == whole


def test_a_recipe_says_it(h: Any) -> None:
    h.data(CHAT, "chat.jsonl")
    (h.folder / "pirate.txt").write_text(SYSTEM)
    recipe = {
        "base": "tiny",
        "train": {
            "one": {"objective": "distil", "teacher": "both", "data": "chat.jsonl", "rank": 2, "max_steps": 1},
            "style": {"data": "chat.jsonl", "rank": 2, "max_steps": 2},
            "pirate": {
                "objective": "distil", "teacher": "base", "system": "pirate.txt", "data": "chat.jsonl", "max_steps": 1,
            },
        },
        "stacks": {"both": "style"},
    }  # fmt: skip
    (h.folder / "stackctl.yaml").write_text(json.dumps(recipe))
    built = h.run("train", "--json").json["built"]
    assert [b.get("adapter", b.get("stack")) for b in built].index("both") < [b.get("adapter") for b in built].index(
        "one"
    )
    assert h.run("train", "--json").json["built"] == []
    (h.folder / "pirate.txt").write_text("Answer like a judge.")
    plan = h.run("train", "--dry-run", "--json").json["plan"]
    assert {step["name"]: step["why"] for step in plan}["pirate"] == "another teacher"
    assert {step["name"]: step["why"] for step in plan}["one"] is None


def test_dry_run_says_the_teacher(h: Any) -> None:
    h.add("style", seed=1)
    done = distil(h, "style", "--rank", 2, "--dry-run").json
    assert (done["teacher"], done["dry_run"], done["on"]) == ("style@1", True, [])


def test_everything_wrong_is_said_at_once(h: Any) -> None:
    h.add("style", seed=1)
    told = h.run(
        "distil", "style", "--name", "base", "--rank", 4000, "--system", "no.txt", "--patience", 2, "--json", code=2
    ).json["error"]["message"]
    for part in ("'base'", "--rank 4000", "no.txt", "--patience"):
        assert part in told
    told = h.run(
        "train", "x", "--objective", "distil", "--on", "style", "--from", "style", "--train-tokens", "auto", "--data",
        h.data(), "--json", code=2,
    ).json["error"]["message"]  # fmt: skip
    for part in ("--on style", "--from", "--train-tokens", "needs a teacher"):
        assert part in told
    assert h.adapters() == {"style"}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("distil", "nobody", "--name", "x"), 3, "nobody"),
        (("distil", "base", "--name", "x"), 2, "nothing to distil"),
        (("distil", "style:0", "--name", "x"), 2, "nothing to distil"),
        (("distil", "whole", "--name", "x"), 4, "whole modules"),
        (("distil", "rows", "--name", "x"), 4, "rows of single tokens"),
        (("distil", "cut", "--name", "x"), 4, "composed by svd"),
        (("distil", "style", "--name", "x", "--target-modules", "q_proj"), 4, "leave out --target-modules"),
        (("train", "x", "--teacher", "style"), 2, "--objective distil"),
        (("train", "x", "--objective", "distil", "--teacher", "style", "--beta", 1), 2, "--beta"),
        (("distil", "style", "--name", "x", "--system", "empty.txt"), 2, "is empty"),
        (("distil", "style", "--name", "x", "--system", "/dev/zero"), 2, "larger than 32 MiB"),
        (("distil", "style:1e300", "--name", "x"), 5, "does not fit float32"),
    ],
)
def test_what_cannot_be_distilled_is_refused_by_name(h: Any, options: Any, code: int, said: str) -> None:
    h.add("style", seed=1)
    h.add("whole", seed=2, modules_to_save=["lm_head"])
    h.add("rows", seed=3, trainable_token_indices=[3, 4])
    h.run("compose", "style", "--method", "svd", "--rank", 2, "--name", "cut")
    (h.folder / "empty.txt").write_text(" \n")
    error = h.run(*options, "--data", h.data(), "--json", code=code).json["error"]
    assert said in error["message"] + error["hint"]
    assert "x" not in h.adapters()


def test_a_system_prompt_needs_conversations_a_role_and_room(h: Any) -> None:
    (h.folder / "pirate.txt").write_text(SYSTEM)
    system = ("--rank", 2, "--system", "pirate.txt")
    pair = {
        "prompt": TALKS[0]["messages"][:1],
        "chosen": TALKS[0]["messages"][1:],
        "rejected": TALKS[1]["messages"][1:],
    }
    texts = {key: turns[0]["content"] for key, turns in pair.items()}
    for records in (TEXTS, [texts]):
        assert "not a conversation" in distil(h, "base", *system, records=records, code=2).json["error"]["message"]
    asked = [distil(h, "base", *system, "--dry-run", records=records).json for records in ([pair], TALKS[:1])]
    assert asked[0]["preview"] == asked[1]["preview"], "of a pair the chosen answer"
    (h.folder / "pirate.txt").write_text("Be brief. " * 60)
    assert "behind the system prompt" in distil(h, "base", *system, code=2).json["error"]["message"]


def test_a_template_without_the_role_is_refused(run: Any, models: Any, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(models("llama"), tmp_path / "mute"))
    template = "{% for m in messages if m.role != 'system' %}" + CHATML.removeprefix("{% for m in messages %}")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    run("init")
    run("base", "add", "mute", folder)
    (tmp_path / "pirate.txt").write_text(SYSTEM)
    data = oracle.write_jsonl(tmp_path / "data.jsonl", TALKS)
    ran = run("distil", "base", "--name", "x", "--system", "pirate.txt", "--data", data, "--json", code=4)
    assert "shows no system prompt" in ran.json["error"]["message"]


@pytest.mark.usefixtures("forked_ranks")
def test_two_processes_are_taught_as_one(h: Any) -> None:
    two(h)
    options = ("--rank", 2, "--max-steps", 3, "--learning-rate", 1e-3)
    alone = distil(h, "style+chat", *options, records=TALKS).json
    both = distil(h, "style+chat", *options, "--batch-size", 2, "--num-processes", 2, records=TALKS).json
    assert both["processes"] == 2
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    for key in ("divergence_before", "divergence_before_error", "divergence", "loss"):
        assert both["distilled"][key] == pytest.approx(alone["distilled"][key], rel=1e-3)
