"""Text from a stack: what transformers' own ``generate`` writes with raw PEFT and all members live."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import END, START
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, GenerationConfig

PROMPTS = ["Tell me about the sea.", "Hi", "  海是什么？ ", "A rather longer prompt, so that a batch has to be padded."]


def chat_ids(prompt: str, system: str | None = None) -> list[int]:
    """A prompt as ChatML lays it out for an answer."""
    byte = oracle.byte_ids
    before = [START, *byte(f"system\n{system}"), END, *byte("\n")] if system else []
    return [*before, START, *byte(f"user\n{prompt}"), END, *byte("\n"), START, *byte("assistant\n")]


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """What comes next by the largest logit, without a cache, up to an end."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < count:
            token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
            if token == END:
                break
            new.append(token)
    return new


def text(ids: list[int]) -> str:
    return tiny_tokenizer().decode(ids, skip_special_tokens=True)


def answers(ran: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ran.out.splitlines()]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "neox", "mistral"])
def test_greedy_text_is_transformers_own_on_raw_peft(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1)
    h.add("instruct", seed=2)
    model = oracle.live(h.base, *h.members(("style", 0.7), ("instruct", 1)))
    what = "style:0.7+instruct"
    prompts = [part for prompt in PROMPTS for part in ("-p", prompt)]
    batch = answers(h.run("generate", what, *prompts, "--max-new-tokens", 12, "--json"))
    alone = [answers(h.run("generate", what, "-p", p, "--max-new-tokens", 12, "--json"))[0] for p in PROMPTS[:2]]
    pairs = answers(h.run("generate", what, *prompts, "--max-new-tokens", 12, "--batch-size", 2, "--json"))
    assert [a["text"] for a in batch] == [a["text"] for a in pairs]
    assert [a["text"] for a in batch[:2]] == [a["text"] for a in alone]
    texts = [greedy(model, chat_ids(prompt), 12) for prompt in PROMPTS]
    for prompt, answer, wanted in zip(PROMPTS, batch, texts, strict=True):
        ids = chat_ids(prompt)
        own = model.generate(
            input_ids=torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            generation_config=GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=END, pad_token_id=END),
        )[0, len(ids) :].tolist()
        assert wanted == own[: len(wanted)]
        assert answer["text"] == text(wanted)
        assert answer["prompt"] == prompt, "verbatim"
        assert answer["prompt_tokens"] == len(ids)
        assert answer["new_tokens"] == len(wanted)
        assert answer["stop"] == ("length" if len(wanted) == 12 else "end")
        assert answer["tokens_per_second"] > 0
    bare = oracle.load_plain(h.base)
    assert [greedy(bare, chat_ids(p), 12) for p in PROMPTS] != texts


def test_raw_adds_nothing_and_system_goes_first(h: Any) -> None:
    model = oracle.live(h.base)
    for prompt in ("The sea", " is\n"):
        raw = h.run("generate", "base", "-p", prompt, "--raw", "--max-new-tokens", 8, "--json").json
        assert raw["text"] == text(greedy(model, oracle.byte_ids(prompt), 8))
        assert raw["prompt_tokens"] == len(prompt)
    told = h.run("generate", "base", "-p", "Hi", "--system", "Be brief.", "--max-new-tokens", 8, "--json").json
    assert told["text"] == text(greedy(model, chat_ids("Hi", "Be brief."), 8))


def test_raw_keeps_what_the_tokenizer_puts_before_any_text(h: Any, tmp_path: Path) -> None:
    """A style was trained behind the BOS of such a base, and its next text begins there, too."""
    folder = tmp_path / "begins"
    shutil.copytree(h.base, folder)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", START)]
    )
    tokenizer.save_pretrained(folder)
    h.run("base", "add", "begins", folder)
    wanted = [START, *oracle.byte_ids("The sea")]
    assert tokenizer("The sea")["input_ids"] == wanted
    model = oracle.live(folder)
    for prompt in ("The sea", "<|im_start|>The sea"):
        options = ("--base", "begins", "--raw", "--max-new-tokens", 8, "--json")
        raw = h.run("generate", "base", "-p", prompt, *options).json
        assert raw["prompt_tokens"] == len(wanted), "and none twice"
        assert raw["text"] == text(greedy(model, wanted, 8))
        assert raw["prompt"] == prompt


def test_streamed_text_is_the_same_text(h: Any) -> None:
    h.add("style", seed=1)
    known = h.run("generate", "style", "-p", "Hi", "--max-new-tokens", 20, "--json").json["text"]
    assert h.run("generate", "style", "-p", "Hi", "--max-new-tokens", 20).out == known + "\n"
    assert h.run("generate", "style", "--max-new-tokens", 20, stdin="Hi\n").out == known + "\n"


def eager_to_end(base: Path, out: Path, after: int) -> Path:
    """A copy of a model whose greedy answer to "Hi" ends after some tokens: the head prefers the end there."""
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = chat_ids("Hi")
    ids += greedy(model, ids, after)
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        model.lm_head.weight[END] = 0
        model.lm_head.weight[END] = (model.lm_head(hidden).max() + 0.1) * hidden / hidden.square().sum()
    model.save_pretrained(out)
    tiny_tokenizer().save_pretrained(out)
    return out


def test_it_stops_at_the_end_of_the_turn(h: Any, tmp_path: Path) -> None:
    """The trap: the end of a turn is the padding token here, and a batch goes on padding with it."""
    folder = eager_to_end(h.base, tmp_path / "brief", 4)
    h.run("base", "add", "brief", folder)
    model = oracle.load_plain(folder)
    wanted = greedy(model, chat_ids("Hi"), 30)
    assert 0 < len(wanted) < 30
    options = ["--base", "brief", "--max-new-tokens", 30, "--json"]
    answer = h.run("generate", "base", "-p", "Hi", *options).json
    assert (answer["text"], answer["stop"], answer["new_tokens"]) == (text(wanted), "end", len(wanted))
    both = answers(h.run("generate", "base", "-p", PROMPTS[3], "-p", "Hi", *options))
    assert both[1]["text"] == text(wanted)
    assert both[1]["new_tokens"] == len(wanted)


def test_a_stop_text_ends_the_answer_before_it(h: Any) -> None:
    ids = greedy(oracle.load_plain(h.base), oracle.byte_ids("The sea"), 20)
    whole = text(ids)
    piece = next(whole[i : i + 2] for i in range(4, len(whole)) if whole[i : i + 2].isascii())
    found = h.run("generate", "base", "-p", "The sea", "--raw", "--stop", piece, "--max-new-tokens", 20, "--json").json
    assert found["text"] == whole[: whole.index(piece)]
    assert found["stop"] == "stop"


def test_the_bases_own_generation_defaults_change_nothing(tiny_registry: Any, tmp_path: Path) -> None:
    """The trap: ``generate`` fills whatever a configuration leaves open from the model's generation_config.json."""
    import shutil

    h = tiny_registry()
    folder = tmp_path / "opinionated"
    shutil.copytree(h.base, folder)
    known = json.loads((folder / "generation_config.json").read_text())
    opinions = {
        "do_sample": True, "temperature": 3.0, "top_k": 2, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1,
        "min_new_tokens": 30, "bad_words_ids": [[101]], "num_beams": 1, "min_p": 0.5, "suppress_tokens": [32],
    }  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps({**known, **opinions}))
    h.run("base", "add", "opinionated", folder)
    model = oracle.load_plain(h.base)
    naive = AutoModelForCausalLM.from_pretrained(folder).eval()
    for prompt in PROMPTS:
        wanted = greedy(model, chat_ids(prompt), 24)
        found = h.run("generate", "base", "--base", "opinionated", "-p", prompt, "--max-new-tokens", 24, "--json").json
        assert found["text"] == text(wanted)
        swayed = naive.generate(
            input_ids=torch.tensor([chat_ids(prompt)]),
            generation_config=GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=END, pad_token_id=END),
        )[0, len(chat_ids(prompt)) :].tolist()
        assert swayed != wanted
    draws = {
        base: h.run(
            "generate", "base", "--base", base, "-p", "Hi", "--temperature", 0.9, "--seed", 3, "--max-new-tokens", 24,
            "--json",
        ).json["text"]
        for base in ("tiny", "opinionated")
    }  # fmt: skip
    assert draws["tiny"] == draws["opinionated"]


def test_a_seed_repeats_and_temperature_varies(h: Any) -> None:
    h.add("style", seed=1)
    options = ["generate", "style", "-p", "Hi", "-p", "Who?", "--temperature", 1.5, "--max-new-tokens", 16, "--json"]
    first, again, other = ([a["text"] for a in answers(h.run(*options, "--seed", seed))] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    cold = answers(h.run(*options[:-4], 0, *options[-3:]))
    plain = answers(h.run(*options[:6], *options[-3:]))
    assert [a["text"] for a in cold] == [a["text"] for a in plain], "temperature 0 is greedy"
    tiny_p = answers(h.run(*options, "--top-p", 1e-6, "--seed", 5))
    assert [a["text"] for a in tiny_p] == [a["text"] for a in plain], "so is a nucleus of one token"


def test_logits_that_are_no_numbers_are_no_answer(h: Any) -> None:
    h.add("style", seed=1)
    for line in (
        ["generate", "style:1e300"],
        ["generate", "style:1e20", "--temperature", 1],
        ["compare", "style", "style:1e300"],
    ):
        ran = h.run(*line, "-p", "hi", "--max-new-tokens", 2, "--json", code=4)
        assert "not a finite number" in ran.out, line


def test_prompts_that_cannot_be_answered_are_2(h: Any, tmp_path: Path) -> None:
    h.run("generate", "base", "-p", "", code=2)
    h.run("generate", "base", "-p", " \n", code=2)
    h.run("generate", "base", stdin="", code=2)
    h.run("generate", "base", "-p", "x" * 512, "--raw", code=2)
    for idle in (["--system", "x"], ["--enable-thinking"], ["--chat-template-kwargs", "{}"]):
        for command in (["generate", "base"], ["compare", "base", "base"], ["bisect", "style", "--bad", "x"]):
            assert f"{idle[0]} would change nothing" in h.run(*command, "-p", "x", "--raw", *idle, code=2).err
    h.run("generate", "base", "-p", "x" * 500, code=2)
    last = h.run("generate", "base", "-p", "x" * 510, "--raw", "--max-new-tokens", 50, "--json").json
    assert last["new_tokens"] <= 2, "an answer ends with the context"
    both = answers(h.run("generate", "base", "-p", "x" * 505, "-p", "Hi", "--raw", "--max-new-tokens", 20, "--json"))
    alone = h.run("generate", "base", "-p", "Hi", "--raw", "--max-new-tokens", 20, "--json").json
    assert both[1]["text"] == alone["text"], "a long prompt leaves its neighbours their room"
    assert alone["new_tokens"] == 20
    prompts = oracle.write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"prompt": "two\nlines"}])
    found = answers(h.run("generate", "base", "--prompts", prompts, "--max-new-tokens", 3, "--json"))
    assert [answer["prompt"] for answer in found] == ["Hi", "two\nlines"]
    assert all(answer["schema"] == 1 for answer in found)


def test_compare_is_generate_side_by_side(h: Any) -> None:
    h.add("style", seed=1)
    h.add("instruct", seed=2)
    stacks = ["base", "style", "style+instruct", "style"]
    rows = h.run("compare", *stacks, "-p", "Hi", "--max-new-tokens", 10, "--json").json["results"]
    assert [row["stack"] for row in rows] == stacks
    members = [(), (("style", 1),), (("style", 1), ("instruct", 1)), (("style", 1),)]
    for row, live in zip(rows, members, strict=True):
        model = oracle.live(h.base, *h.members(*live))
        assert row["text"] == text(greedy(model, chat_ids("Hi"), 10))
