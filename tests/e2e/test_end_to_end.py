"""The whole path on SmolLM2-135M with the installed command. Nothing here knows how stackctl is made."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from serving import installed, serving
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def some_records(source: Path, target: Path, count: int = 2) -> Path:
    """The first records of an example file."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, count)), encoding="utf-8")
    return target


# -- what was made ----------------------------------------------------------------------------------------------------


def test_training_registered_what_it_says(trained):
    listed = trained.json("ls")
    assert [row["name"] for row in listed["adapters"]] == ["instruct", "style"]
    assert [row["name"] for row in listed["stacks"]] == ["storyteller"]
    assert [row["name"] for row in listed["bases"]] == ["smollm2"]
    assert listed["runs"] == []
    instruct = trained.json("inspect", "instruct")
    assert instruct["needs"] == ["style@1"]
    assert instruct["run"]["steps"] == 2
    assert instruct["problems"] == []
    assert trained.json("verify")["problems"] == []


def test_a_checkpoint_is_whole_by_itself(trained):
    folder = Path(trained.json("inspect", "instruct")["path"])
    names = {file.name for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "adapter_info.json"} <= names
    info = json.loads((folder / "adapter_info.json").read_text())
    assert info["trained_on"][0]["adapter"] == "style"
    assert info["trained_on"][0]["digest"] == trained.json("inspect", "style")["digest"]
    assert AutoTokenizer.from_pretrained(folder).chat_template


def test_compose_and_inspect(trained):
    found = trained.json("compose", "style:0.5+instruct", "--dry-run")
    assert [(m["adapter"], m["version"], m["weight"]) for m in found["members"]] == [
        ("style", 1, 0.5),
        ("instruct", 1, 1),
    ]
    assert (found["method"], found["exact"], found["rank"]) == ("sum", True, 32)
    shown = trained("inspect").stdout
    assert all(word in shown for word in ("smollm2", "style@1", "instruct@1"))


def test_generate_and_compare(trained):
    asked = "What is the capital of Canada?"
    found = trained.json("generate", "-p", asked, "--max-new-tokens", "10")
    assert (found["stack"], found["prompt"]) == ("storyteller", asked)
    assert found["text"].strip()
    assert "<|im_" not in found["text"]
    results = trained.json("compare", "base", "storyteller", "-p", asked, "--max-new-tokens", "10")["results"]
    assert [r["stack"] for r in results] == ["base", "storyteller"]
    assert results[1]["text"] == found["text"]
    assert len({r["text"] for r in results}) > 1


# -- the number -------------------------------------------------------------------------------------------------------


def chat_example(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids, and labels on every assistant turn with its end-of-turn token, by the text of the template."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    turns = [m.span(1) for m in re.finditer(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)]
    labels = [
        token if any(begin <= start and end <= stop for begin, stop in turns) else -100
        for token, (start, end) in zip(found["input_ids"], found["offset_mapping"], strict=True)
    ]
    return found["input_ids"], labels


def text_example(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Every token, then the end of the text."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return ids, ids


@torch.no_grad()
def mean_loss(model: Any, examples: list[tuple[list[int], list[int]]]) -> tuple[float, int]:
    """Mean cross-entropy over all supervised tokens of some examples, and how many they are."""
    total, count = 0.0, 0
    for ids, labels in examples:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        wanted = torch.tensor(labels[1:])
        total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
        count += int((wanted != -100).sum())
    return total / count, count


@pytest.fixture(scope="module")
def oracle(trained):
    """The base with both adapters attached by plain PEFT, in float32."""
    base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, trained.json("inspect", "style")["path"], adapter_name="a")
    model.load_adapter(trained.json("inspect", "instruct")["path"], adapter_name="b")
    return model.eval()


LIVE = {"base": [], "style": ["a"], "storyteller": ["a", "b"]}


@pytest.fixture(scope="module")
def evaluated(trained):
    """The rows of one ``eval`` of all stacks on both kinds of records."""
    sources = [
        some_records(EXAMPLES / f"{name}-heldout.jsonl", trained.folder / f"{name} held out.jsonl").name
        for name in ("instruct", "style")
    ]
    return trained.json("eval", *LIVE, *(word for name in sources for word in ("--data", name)))["results"]


@pytest.mark.parametrize("name", ["instruct", "style"])
def test_eval_equals_raw_peft_with_both_adapters_live(trained, oracle, evaluated, name):
    source = trained.folder / f"{name} held out.jsonl"
    records = [json.loads(line) for line in source.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(trained.base)
    if name == "instruct":
        examples = [chat_example(tokenizer, record["messages"]) for record in records]
    else:
        examples = [text_example(tokenizer, record["text"]) for record in records]
    rows = [row for row in evaluated if Path(row["data"]).name == source.name]
    assert [row["stack"] for row in rows] == list(LIVE)
    for row in rows:
        if active := LIVE[row["stack"]]:
            oracle.base_model.set_adapter(active)
            loss, tokens = mean_loss(oracle, examples)
        else:
            with oracle.disable_adapter():
                loss, tokens = mean_loss(oracle, examples)
        assert row["tokens"] == tokens
        assert row["records"] == 2
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        print(f"{row['stack']} on {name}: differs by {abs(row['loss'] / loss - 1):.1e}")
    assert len({round(row["loss"], 4) for row in rows}) == len(LIVE)


# -- further on -------------------------------------------------------------------------------------------------------


def test_push_dry_run_says_what_would_go_up_and_asks_nobody(trained):
    found = trained.json("push", "storyteller", "me/storyteller", "--dry-run")
    assert {"schema", "repo", "commit", "url", "files"} <= set(found)
    assert found["repo"] == "me/storyteller"
    names = {file["path"] for file in found["files"]}
    assert {"adapter_config.json", "adapter_model.safetensors", "stack.yaml", "README.md"} <= names
    assert trained.json("push-to-hub", "storyteller", "me/storyteller", "--dry-run")["files"] == found["files"]


def test_an_export_is_one_plain_adapter_that_peft_loads(trained, oracle):
    out = trained.folder / "exported"
    found = trained.json("export", "storyteller", "--format", "peft", "--out", "exported")
    assert (found["path"], found["rank"], found["exact"]) == (str(out), 32, True)
    ids = torch.tensor([AutoTokenizer.from_pretrained(trained.base)("The tide goes out.")["input_ids"]])
    oracle.base_model.set_adapter(["a", "b"])
    with torch.no_grad():
        wanted = oracle(input_ids=ids).logits
        oracle.load_adapter(out, adapter_name="whole")
        oracle.base_model.set_adapter("whole")
        got = oracle(input_ids=ids).logits
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


def test_a_recipe_in_chinese_is_built_and_then_up_to_date(trained):
    (trained.folder / "stackctl.yaml").write_text(
        f"""\
base: smollm2
train:
  instruct-zh: {{on: style-zh, data: {EXAMPLES / "instruct-zh.jsonl"}, max_steps: 1, batch_size: 1, max_length: 128}}
  style-zh: {{data: {EXAMPLES / "style-zh.jsonl"}, max_steps: 1, batch_size: 1, max_length: 128}}
stacks: {{storyteller-zh: style-zh+instruct-zh}}
"""
    )
    built = trained.json("train")["built"]
    assert [b.get("adapter") or b["stack"] for b in built] == ["style-zh", "instruct-zh", "storyteller-zh"]
    assert built[1]["on"] == ["style-zh@1"]
    assert trained("train").stdout == "up to date\n"
    source = some_records(EXAMPLES / "style-zh-heldout.jsonl", trained.folder / "测试.jsonl", 1)
    rows = trained.json("eval", "base", "storyteller-zh", "--data", source.name)["results"]
    assert rows[0]["tokens"] == rows[1]["tokens"] > 0


def test_prompts_and_answers_may_be_in_any_script(trained):
    asked = "海边的早晨是什么样的？"
    found = trained.json("generate", "base", "--max-new-tokens", "8", stdin=asked)
    assert found["prompt"] == asked and found["text"].strip()


def test_failures_end_as_the_contract_says(trained):
    for code, arguments in (
        (2, ("compose", "style++instruct")),
        (2, ("nosuch",)),
        (3, ("inspect", "style@9")),
        (4, ("compose", "style+style")),
    ):
        done = trained(*arguments, "--json", code=code)
        assert set(json.loads(done.stdout)) == {"schema", "error"}
        assert [line.split()[0] for line in done.stderr.splitlines()] == ["error:", "hint:"]


# -- served -----------------------------------------------------------------------------------------------------------

STACKS = ["base", "style", "storyteller", "style:0.5+instruct", "style:-0.5+instruct@1:1.5"]


def test_five_expressions_at_once_stream_what_generate_writes(trained, monkeypatch):
    """OpenAI's own client gets the texts of ``compare``, which are those of ``generate``."""
    asked = "Tell me about the sea."
    told = trained.json("compare", *STACKS, "-p", asked, "--max-new-tokens", 16)["results"]
    known = {found["stack"]: found["text"] for found in told}
    assert list(known) == STACKS
    assert len(set(known.values())) > 2
    monkeypatch.setenv("HOME", str(trained.home))
    with serving(trained.folder, start=installed) as server:
        client = server.client()

        def streamed(name):
            chunks = client.chat.completions.create(
                model=name, messages=[{"role": "user", "content": asked}], max_tokens=16, stream=True
            )
            return name, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(len(STACKS)) as pool:
            assert dict(pool.map(streamed, STACKS)) == known
        assert server.stop() == 0
