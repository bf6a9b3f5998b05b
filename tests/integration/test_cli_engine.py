"""What train, generate, compare, eval and export put on stdout, on a tiny model."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
from tiny import random_adapter

TEXTS = ["The tide goes out.", "A lamp in the window.", "Salt and rope.", "It rained all day long."]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "text data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def chats(tmp_path):
    path = tmp_path / "chats.jsonl"
    records = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}] * (n + 1) for n in range(3)
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in records))
    return path


QUICK = ("--max-steps", "2", "--batch-size", "2", "--rank", "2")


@pytest.fixture
def style(registry, run, models, tmp_path):
    """An adapter with an effect, registered as style@1."""
    run("add", "style", random_adapter(models("llama"), tmp_path / "checkpoints" / "style"))
    return registry


# -- train ------------------------------------------------------------------------------------------------------------


def test_train_tells_its_keys_in_one_document(registry, run, data):
    ran = run("train", "style", "--data", data, *QUICK, "--json")
    assert len(ran.out.splitlines()) == 1
    found = ran.json
    assert {
        "schema", "adapter", "version", "digest", "path", "base", "on", "steps", "tokens", "supervised_tokens", "loss",
        "tokens_per_second", "trainable_parameters", "frozen",
    } <= set(found)  # fmt: skip
    assert (found["schema"], found["adapter"], found["version"], found["base"]) == (1, "style", 1, "tiny")
    assert found["on"] == []
    assert found["steps"] == 2
    size = sum(len(text.encode()) for text in TEXTS)
    assert size <= found["tokens"] <= size + 2 * len(TEXTS)
    assert 0 < found["supervised_tokens"] <= found["tokens"]
    assert found["loss"] > 0
    assert found["tokens_per_second"] > 0
    assert Path(found["path"]) == registry / "weights" / "style" / "1"
    assert Path(found["path"], "adapter_model.safetensors").is_file()
    listed = run("ls", "--json").json
    assert [(row["name"], row["versions"][0]["digest"]) for row in listed["adapters"]] == [("style", found["digest"])]
    assert listed["runs"] == []


def test_quiet_train_prints_the_new_version(style, run, data):
    ran = run("train", "style", "--data", data, *QUICK, "-q")
    assert ran.out == "style@2\n"


def test_train_on_a_stack_names_what_it_stands_on(style, run, chats):
    found = run("train", "instruct", "--on", "style:0.5", "--data", chats, *QUICK, "--json").json
    assert found["on"] == ["style@1:0.5"]
    assert found["frozen"] in ("fold", "live")
    assert run("inspect", "instruct", "--json").json["needs"] == ["style@1:0.5"]


def test_a_dry_run_of_train_says_what_it_would_do_and_writes_nothing(style, run, data):
    before = {path: path.stat().st_mtime_ns for path in style.rglob("*")}
    found = run("train", "instruct", "--on", "style", "--data", data, *QUICK, "--dry-run", "--json").json
    assert (found["adapter"], found["on"], found["steps"]) == ("instruct", ["style@1"], 2)
    assert {path: path.stat().st_mtime_ns for path in style.rglob("*")} == before


def test_all_that_is_wrong_with_a_job_is_said_at_once(style, fails):
    said = fails("train", "x", "--on", "nosuch", "--data", "nosuch.jsonl", code=3)
    assert "nosuch'" in said
    assert "nosuch.jsonl" in said
    said = fails("train", "x", "--on", "style", "--target-modules", "q_prj", "--data", "nosuch.jsonl", code=3)
    assert "nosuch.jsonl" in said
    assert "q_prj" in said
    assert "q_proj" in said.partition(" | ")[2]


def test_a_data_error_names_its_line(style, fails, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    assert "line 3" in fails("train", "x", "--data", "bad.jsonl", *QUICK, code=2)
    assert "line 3" in fails("eval", "style", "--data", "bad.jsonl", code=2)


def test_a_failed_training_registers_nothing(style, run, fails, data):
    fails("train", "x", "--data", data, *QUICK, "--learning-rate", "1e30", "--scheduler", "constant", code=1)
    assert [row["name"] for row in run("ls", "--json").json["adapters"]] == ["style"]


@pytest.mark.parametrize("word", ["keys", "lora", "default", "0", "frozen"])
def test_training_is_indifferent_to_words_of_peft(style, run, data, word):
    found = run("train", word, "--on", "style", "--data", data, "--max-steps", "1", "--rank", "1", "--json").json
    assert found["adapter"] == word
    run("verify")


# -- generate ---------------------------------------------------------------------------------------------------------

KEYS = {"stack", "prompt", "text", "prompt_tokens", "new_tokens", "stop", "tokens_per_second"}


def test_generate_puts_one_document_a_prompt_on_a_line_each(style, run):
    prompts = ["  with  spaces ", "two\nlines", "ünïcödé 灯"]
    arguments = [word for prompt in prompts for word in ("-p", prompt)]
    ran = run("generate", "style", *arguments, "--max-new-tokens", "3", "--json")
    documents = [json.loads(line) for line in ran.out.splitlines()]
    assert [d["prompt"] for d in documents] == prompts
    for document in documents:
        assert {"schema"} | KEYS <= set(document)
        assert document["schema"] == 1
        assert document["stack"] == "style"
        assert 0 < document["new_tokens"] <= 3
        assert "<|im_" not in document["text"]


def test_raw_adds_no_token_of_its_own(style, run):
    raw = run("generate", "style", "-p", "abcde", "--raw", "--max-new-tokens", "2", "--json").json
    assert raw["prompt_tokens"] == 5
    assert run("generate", "style", "-p", "abcde", "--max-new-tokens", "2", "--json").json["prompt_tokens"] > 5


def test_prompts_come_from_a_file_or_from_standard_input(style, run, fails, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a\\nb"}\n"c"\n')
    quick = ("--max-new-tokens", "1", "--json")
    for name, expected in (("prompts.txt", ["one", "two"]), ("prompts.jsonl", ["a\nb", "c"])):
        ran = run("generate", "style", "--prompts", name, *quick)
        assert [json.loads(line)["prompt"] for line in ran.out.splitlines()] == expected
    assert run("generate", "style", *quick, stdin="from a pipe\n").json["prompt"] == "from a pipe"
    assert run("generate", "style", *quick, stdin="\ufefffrom a pipe\n").json["prompt"] == "from a pipe"
    fails("generate", "style", "--max-new-tokens", "1", code=2)  # an empty stdin: nothing prompts
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    assert "line 2" in fails("generate", "style", "--prompts", "bad.jsonl", code=2)


def test_greedy_text_is_the_same_streamed_quiet_and_as_json(style, run):
    arguments = ("generate", "style", "-p", "abc", "--max-new-tokens", "8")
    text = run(*arguments, "--json").json["text"]
    assert run(*arguments).out == text + "\n"
    assert run(*arguments, "-q").out == text + "\n"


def test_sampling_is_repeatable_with_a_seed(style, run):
    arguments = ("generate", "style", "-p", "abc", "--max-new-tokens", "12", "--temperature", "1.5", "--json")
    texts = [run(*arguments, "--seed", seed).json["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_current_stack_is_meant_when_none_is_named(style, run, fails, data):
    fails("generate", "-p", "x", code=2)
    fails("eval", "--data", data, code=2)
    run("compose", "style:0.5", "--name", "half")
    assert run("generate", "-p", "x", "--max-new-tokens", "1", "--json").json["stack"] == "half"
    assert run("eval", "--data", data, "--json").json["results"][0]["stack"] == "half"


# -- compare and eval -------------------------------------------------------------------------------------------------


def test_compare_is_one_document_in_the_order_asked_for(style, run):
    run("compose", "style:-1", "--name", "minus")
    asked = ("minus", "base", "style:0.5", "style")
    ran = run("compare", *asked, "-p", "one", "-p", "two", "--max-new-tokens", "3", "--json")
    assert len(ran.out.splitlines()) == 1
    results = ran.json["results"]
    assert [(r["stack"], r["prompt"]) for r in results] == [(s, p) for p in ("one", "two") for s in asked]
    assert all(set(result) >= KEYS for result in results)
    alone = run("generate", "style", "-p", "two", "--max-new-tokens", "3", "--json").json
    assert results[-1]["text"] == alone["text"]
    shown = run("compare", "base", "style", "-p", "one", "--max-new-tokens", "3").out
    assert "base" in shown
    assert "style" in shown


def test_eval_is_one_document_in_the_order_asked_for(style, run, data):
    asked = ("style", "base", "style:0")
    ran = run("eval", *asked, "--data", data, "--json")
    assert len(ran.out.splitlines()) == 1
    results = ran.json["results"]
    assert [r["stack"] for r in results] == list(asked)
    for row in results:
        assert {"stack", "loss", "perplexity", "tokens", "records"} <= set(row)
        assert row["records"] == len(TEXTS)
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert results[1]["loss"] == results[2]["loss"] != results[0]["loss"]
    assert [line for line in run("eval", *asked, "--data", data).out.splitlines() if line.strip().startswith("style")]


def test_eval_counts_the_supervised_tokens(style, run, chats, data):
    both = run("eval", "base", "style", "--data", chats, "--data", data, "--json").json["results"]
    assert [(r["stack"], Path(r["data"]).name) for r in both] == [
        (stack, name) for stack in ("base", "style") for name in ("chats.jsonl", "text data.jsonl")
    ]
    assert both[0]["tokens"] == 6 * len("yes" + "E")  # six turns, their end of turn each, nothing else
    assert both[0]["records"] == 3


def test_eval_of_an_absurd_weight_is_still_json(style, run, data):
    ran = run("eval", "style:100000", "--data", data, "--json", code=None)
    assert ran.code in (0, 1)
    assert ran.json["schema"] == 1
    assert "this is a bug" not in ran.err


def test_eval_and_compare_need_one_base(style, run, fails, models, data):
    run("base", "add", "second", models("llama", seed=3))
    found = run("eval", "base", "style", "--data", data, "--json").json["results"]
    assert len(found) == 2  # 'base' among them is the others' base
    fails("eval", "base", "--data", data, "--base", "nosuch", code=3)
    fails("compare", "second", "style", "-p", "x", code=4)


# -- export -----------------------------------------------------------------------------------------------------------


def test_export_tells_its_keys_and_leaves_nothing_when_it_fails(style, run, fails, tmp_path):
    found = run("export", "style:0.5", "--format", "peft", "--out", "out dir", "--json").json
    assert {"schema", "format", "path", "files", "rank", "exact", "max_relative_error"} <= set(found)
    assert found["path"] == str(tmp_path / "out dir")
    for file in found["files"]:
        raw = (tmp_path / "out dir" / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert run("inspect", "out dir/", "--json").json["problems"] == []
    fails("export", "style", "--out", "out dir", code=2)
    fails("export", "style", "--out", "out dir/adapter_config.json/x", code=2)  # was told as a failure, 1
    fails("export", "nosuch", "--out", "other", code=3)
    assert not (tmp_path / "other").exists()
