"""Thoughts, arguments for the chat template, dates in it, a template that an adapter brings: used alike everywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import CHATML, random_adapter

STRIPPED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}[A]{{ m.content.split('</think>')[-1] }}<|im_end|>"
    "{% else %}[U]{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}[A]<think>\n{% endif %}"
)
"""As DeepSeek-R1-Distill's: a thought is dropped, and opened for generation."""
EMPTY = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "<think>{% if '</think>' in m.content %}{{ m.content.split('</think>')[0].split('<think>')[-1] }}{% endif %}"
    "</think>{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think></think>{% endif %}"
)
"""Generation begins behind an empty thought."""
SWITCHED = EMPTY.replace(
    "[assistant]<think></think>", "[assistant]<think>{% if not enable_thinking %}</think>{% endif %}"
)
"""As Qwen3.5's small ones: thinks when it is told to."""
ASK = {"role": "user", "content": "2+2?"}


def base_with(run: Any, models: Any, folder: Path, template: str, *options: str) -> Path:
    """A registry with the base ``tiny`` whose chat template is another one, or none."""
    shutil.copytree(models("llama"), folder / "base")
    file = folder / "base" / "chat_template.jinja"
    file.write_text(template) if template else file.unlink()
    run("init")
    run("base", "add", "tiny", folder / "base", *options)
    return folder / "base"


def record(path: Path, *messages: Any, **beside: Any) -> Path:
    path.write_text(json.dumps({"messages": [ASK, *messages], **beside}) + "\n")
    return path


def learned(run: Any, data: Path, *options: str) -> tuple[str, str, str]:
    """The prompt, what is learned behind it, and what was said."""
    done = run("train", "x", "--base", "tiny", "--data", data, "--dry-run", "--json", "--no-cache", *options)
    parts = done.json["preview"]
    return (
        "".join(p["text"] for p in parts if not p["supervised"]),
        "".join(p["text"] for p in parts if p["supervised"]),
        done.err,
    )


THOUGHT = {"role": "assistant", "content": "<think>\ntwo and two make four\n</think>\n\n4"}


def test_a_thought_that_the_template_drops_is_learned_behind_the_prompt_that_opens_it(
    run: Any, models: Any, tmp_path: Path
) -> None:
    base_with(run, models, tmp_path, STRIPPED)
    prompt, written, _ = learned(run, record(tmp_path / "a.jsonl", THOUGHT))
    assert prompt.endswith("[A]<think>\n")
    assert written == "two and two make four\n</think>\n\n4<|im_end|>"
    _, written, _ = learned(run, record(tmp_path / "b.jsonl", {"role": "assistant", "content": "4"}))
    assert written == "\n</think>\n\n4<|im_end|>"
    apart = {"role": "assistant", "content": "4", "reasoning_content": "two and two make four"}
    assert learned(run, record(tmp_path / "c.jsonl", apart))[1] == "two and two make four\n</think>\n\n4<|im_end|>"


def test_a_thought_behind_a_prompt_that_says_there_is_none(run: Any, models: Any, tmp_path: Path) -> None:
    base_with(run, models, tmp_path, EMPTY)
    prompt, written, said = learned(run, record(tmp_path / "a.jsonl", THOUGHT))
    assert prompt.endswith("[assistant]<think></think>")
    assert written == "4<|im_end|>"
    assert "the thought of the record is not learned: 1 of 1 conversations" in said


def test_arguments_come_from_the_record_the_job_and_the_base_in_this_order(
    run: Any, models: Any, tmp_path: Path
) -> None:
    base_with(run, models, tmp_path, SWITCHED, "--no-enable-thinking")
    thinks, answers = record(tmp_path / "a.jsonl", THOUGHT), {"role": "assistant", "content": "4"}
    with_record = record(tmp_path / "b.jsonl", THOUGHT, chat_template_kwargs={"enable_thinking": True})
    assert learned(run, thinks)[1] == "4<|im_end|>", "the base's"
    assert learned(run, thinks, "--enable-thinking")[1].startswith("\ntwo and two"), "the job's"
    assert learned(run, with_record)[1].startswith("\ntwo and two"), "the record's"
    assert learned(run, with_record, "--no-enable-thinking")[1].startswith("\ntwo and two"), "the record's"
    plain = record(tmp_path / "c.jsonl", answers, enable_thinking=True)
    assert learned(run, plain)[1] == "</think>4<|im_end|>"
    run("base", "add", "tiny", tmp_path / "base", "--chat-template-kwargs", "{}")
    prompt, written, said = learned(run, thinks)
    assert (prompt[-7:], written) == ("<think>", "\ntwo and two make four\n</think>\n\n4<|im_end|>")
    assert "is told enable_thinking=true for turns with a thought" in said


def test_arguments_are_used_alike_in_training_evaluation_and_generation_and_recorded(
    run: Any, models: Any, tmp_path: Path
) -> None:
    base_with(run, models, tmp_path, SWITCHED)
    data = record(tmp_path / "a.jsonl", THOUGHT)
    trained = run("train", "x", "--base", "tiny", "--data", data, "--max-steps", 1, "--enable-thinking", "--json").json
    entry = yaml.safe_load((tmp_path / "registry" / "adapters" / "x.yaml").read_text())
    assert entry["versions"][0]["settings"]["chat_template_kwargs"] == {"enable_thinking": True}
    told = ["--chat-template-kwargs", '{"enable_thinking": true}']
    row = run("eval", "x", "--data", data, "--json", *told).json["results"][0]
    assert row["tokens"] == trained["supervised_tokens"]
    off = run("eval", "x", "--data", data, "--json", "--no-enable-thinking").json["results"][0]
    assert off["tokens"] < row["tokens"]
    asked = ["generate", "x", "-p", "2+2?", "--max-new-tokens", 1, "--json"]
    on, without = run(*asked, "--enable-thinking").json, run(*asked).json
    assert without["prompt_tokens"] - on["prompt_tokens"] == len("</think>")
    wrong = run("generate", "x", "-p", "a", "--chat-template-kwargs", "{", code=2)
    assert "--chat-template-kwargs is not JSON" in wrong.err
    odd = {'{"x": NaN}': "NaN is not JSON", r'{"x": "\ud800"}': "half a character", "[" * 5000: "nested too deeply"}
    odd['{"x": ' + "[" * 500 + "]" * 500 + "}"] = "nested too deeply"
    for text, why in odd.items():
        assert why in run("generate", "x", "-p", "a", "--chat-template-kwargs", text, code=2).err
    wrong = run("train", "y", "--base", "tiny", "--data", data, "--chat-template-kwargs", '{"tools": 1}', code=2)
    assert "'tools', which is not an argument of a chat template" in wrong.err


def test_a_date_is_fixed_for_a_run_recorded_and_part_of_the_caches_key(
    run: Any, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_with(run, models, tmp_path, "{{ strftime_now('%d %b %Y') }} " + CHATML)
    data = record(tmp_path / "a.jsonl", {"role": "assistant", "content": "4"})
    for date, shown in (("2024-02-29", "29 Feb 2024"), ("2025-03-01", "01 Mar 2025")):
        monkeypatch.setenv("STACKCTL_TEMPLATE_DATE", date)
        done = run("train", "x", "--base", "tiny", "--data", data, "--max-steps", 1)
        assert shown in done.err
    versions = yaml.safe_load((tmp_path / "registry" / "adapters" / "x.yaml").read_text())["versions"]
    assert [str(version["run"]["template_date"]) for version in versions] == ["2024-02-29", "2025-03-01"]
    assert run("verify", "--json").json["problems"] == []


def test_the_template_that_an_adapter_brings_is_used_on_a_base_without_one(
    run: Any, models: Any, tmp_path: Path
) -> None:
    base = base_with(run, models, tmp_path, "")
    adapter = random_adapter(base, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text(STRIPPED)
    run("add", "own", adapter)
    data = record(tmp_path / "a.jsonl", THOUGHT)
    row = run("eval", "own", "--data", data, "--json")
    said = "the base 'tiny' has no chat template: that of own@1 is used"
    assert said in row.err
    assert row.json["results"][0]["tokens"] == len("two and two make four\n</think>\n\n4") + 1
    asked = run("generate", "own", "-p", "2+2?", "--max-new-tokens", 1, "--json")
    assert said in asked.err
    assert asked.json["prompt_tokens"] == len("[U]2+2?[A]<think>\n")
    compared = run("compare", "base", "own", "-p", "2+2?", "--max-new-tokens", 1)
    assert said in compared.err
    run("export", "own", "--format", "model", "--out", tmp_path / "model")
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == STRIPPED
    run("export", "own", "--format", "peft", "--out", tmp_path / "peft")
    assert (tmp_path / "peft" / "chat_template.jinja").read_text() == STRIPPED
    on_top = run("train", "next", "--on", "own", "--data", data, "--max-steps", 1)
    assert said in on_top.err
    assert (tmp_path / "registry" / "weights" / "next" / "1" / "chat_template.jinja").read_text() == STRIPPED
