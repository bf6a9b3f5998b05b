"""Many prompts at once: the same answers as one by one, in the order asked, whatever their company."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from architectures import tiny_folder
from tiny import long_rope, tiny_tokenizer
from transformers import Phi3ForCausalLM

from stackctl.engine.generation import Sampling, generate
from stackctl.engine.generation.answers import batches
from stackctl.engine.generation.padding import can_pad
from stackctl.engine.models import StackedModel, load_base
from stackctl.engine.records.prompt_files import Prompt
from stackctl.registry.base_entries import resolve_base

TEXTS = [
    "Hi",
    "A rather longer prompt, so that a batch has to be padded on its left.",
    "海是什么？",
    "Who?",
    "One, two",
]
PROMPTS = [Prompt(text) for text in TEXTS]


def texts(stacked: StackedModel, prompts: list[Prompt], batch_size: int, **options: Any) -> list[str]:
    answers = generate(stacked, prompts, Sampling(max_new_tokens=10, raw=True, **options), batch_size=batch_size)
    return [answer.text for answer in answers]


@pytest.mark.parametrize(
    "name", ["llama", "tied", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "phi3", "neox", "mixtral"]
)
def test_a_batch_writes_what_each_prompt_alone_writes(tiny_registry: Any, name: str) -> None:
    stacked = tiny_registry(name).load()
    alone = texts(stacked, PROMPTS, 1)
    assert len(set(alone)) > 1
    assert texts(stacked, PROMPTS, 5) == alone
    assert texts(stacked, PROMPTS[::-1], 2) == alone[::-1]


@pytest.mark.parametrize("model_type", ["bart", "rwkv", "doge", "git", "recurrent_gemma", "bloom", "mamba"])
def test_a_model_that_takes_padding_for_text_is_never_padded(h: Any, tmp_path: Path, model_type: str) -> None:
    """All but the last two wrote other texts in a batch than alone: masks are not obeyed by every model."""
    h.run("base", "add", "other", tiny_folder(model_type, tmp_path / "other"), "--no-prove")
    stacked = load_base(resolve_base(h.registry, "other"), h.registry)
    assert can_pad(stacked.model) == (model_type in ("bloom", "mamba"))
    prompts = [*PROMPTS, Prompt("Him"), Prompt("Hi")]
    alone = [texts(stacked, [prompt], 1)[0] for prompt in prompts]
    assert texts(stacked, prompts, 7) == alone
    assert texts(stacked, prompts[::-1], 2) == alone[::-1]


def test_angles_of_positions_are_those_of_the_text_alone(tiny_registry: Any, tmp_path: Path) -> None:
    """LongRoPE turns all rows of a batch by the length of the longest."""
    torch.manual_seed(0)
    model = Phi3ForCausalLM(long_rope(40))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "long")
    tiny_tokenizer().save_pretrained(tmp_path / "long")
    h = tiny_registry()
    h.run("base", "add", "long", tmp_path / "long")
    stacked = load_base(resolve_base(h.registry, "long"), h.registry)
    assert can_pad(stacked.model, 40) and not can_pad(stacked.model, 41) and not can_pad(stacked.model)
    alone = [texts(stacked, [prompt], 1)[0] for prompt in PROMPTS]
    assert texts(stacked, PROMPTS, 5) == alone


@pytest.mark.parametrize(
    ("model_type", "chooses"),
    [
        ("glm_moe_dsa", {"index_topk": 8}),
        ("minimax_m3_vl_text", {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_block_size": 8}),
    ],
)
def test_what_an_indexer_chooses_is_that_of_the_text_alone(
    h: Any, tmp_path: Path, model_type: str, chooses: dict[str, Any]
) -> None:
    """Padding moves the columns that it chooses among."""
    h.run("base", "add", "other", tiny_folder(model_type, tmp_path / "other", **chooses), "--no-prove")
    stacked = load_base(resolve_base(h.registry, "other"), h.registry)
    assert can_pad(stacked.model, 8) == (model_type == "glm_moe_dsa") and not can_pad(stacked.model, 9)
    alone = [texts(stacked, [prompt], 1)[0] for prompt in PROMPTS]
    assert texts(stacked, PROMPTS, 5) == alone


def test_a_sliding_window_slides_over_real_tokens_only(tiny_registry: Any, models: Any, tmp_path: Path) -> None:
    folder = tmp_path / "sliding"
    shutil.copytree(models("mistral"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": 8}))
    h = tiny_registry("mistral")
    wide = texts(h.load(), PROMPTS, 5)
    h.run("base", "add", "sliding", folder)
    stacked = load_base(resolve_base(h.registry, "sliding"), h.registry)
    alone = texts(stacked, PROMPTS, 1)
    assert alone != wide, "the window is shorter than the prompts"
    assert texts(stacked, PROMPTS, 5) == alone


def test_what_is_drawn_depends_on_seed_and_prompt_alone(tiny_registry: Any) -> None:
    stacked = tiny_registry().load()
    options: dict[str, Any] = {"temperature": 1.2, "seed": 7}
    alone = [texts(stacked, [prompt], 1, **options)[0] for prompt in PROMPTS]
    assert texts(stacked, PROMPTS, 5, **options) == alone
    assert texts(stacked, PROMPTS[::-1], 3, **options) == alone[::-1]
    assert texts(stacked, PROMPTS, 5, temperature=1.2, seed=8) != alone
    twice = texts(stacked, [PROMPTS[0]] * 2, 2, **options)
    assert twice[0] == alone[0] != twice[1], "asked twice, it is drawn twice"
    free = {texts(stacked, PROMPTS[:1], 1, temperature=1.2)[0] for _ in range(3)}
    assert len(free) > 1, "without a seed every run is another"


def test_draws_follow_the_models_probabilities(tiny_registry: Any) -> None:
    """A chi-square test of 4,000 draws of the first token, over those that are likely enough to count."""
    from transformers import LogitsProcessorList

    from stackctl.engine.generation.logits_processors import processors

    stacked = tiny_registry().load()
    ids = stacked.tokenizer("The sea", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = stacked.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
    for options, expected in (
        ({}, (logits / 0.7).softmax(-1)),
        ({"top_k": 3}, _kept((logits / 0.7).softmax(-1), 3)),
    ):
        chain: LogitsProcessorList = processors(Sampling(temperature=0.7, **options), [len(ids)], [11])
        rows = [chain(torch.tensor([ids]), logits.float()[None].clone()).argmax().item() for _ in range(4000)]
        found = Counter(rows)
        likely = [token for token in range(len(expected)) if expected[token] * 4000 >= 10]
        chi = sum((found[t] - 4000 * float(expected[t])) ** 2 / (4000 * float(expected[t])) for t in likely)
        assert chi < len(likely) + 5 * (2 * len(likely)) ** 0.5
        assert all(expected[token] > 0 for token in found), "nothing that was ruled out is drawn"


def _kept(shares: torch.Tensor, count: int) -> torch.Tensor:
    kept = torch.zeros_like(shares)
    top = shares.topk(count)
    kept[top.indices] = top.values
    return kept / kept.sum()


def test_the_penalty_does_not_see_the_padding(tiny_registry: Any) -> None:
    """The trap: the padding token here is the end of turn, which a padded row would then shun."""
    from stackctl.engine.generation.logits_processors import processors

    ids = torch.tensor([[257, 257, 257, 65, 66], [65, 66, 67, 68, 69]])
    scores = torch.randn(2, 260)
    found = processors(Sampling(repetition_penalty=1.5), [2, 5], [0, 0])(ids, scores.clone())
    wanted = scores.clone()
    for row, tokens in enumerate(([65, 66], [65, 66, 67, 68, 69])):
        for token in tokens:
            wanted[row, token] = scores[row, token] * 1.5 if scores[row, token] < 0 else scores[row, token] / 1.5
    assert torch.equal(found, wanted)
    stacked = tiny_registry().load()
    plain = texts(stacked, PROMPTS, 5)
    alone = texts(stacked, PROMPTS, 1, repetition_penalty=1.3)
    assert alone != plain
    assert texts(stacked, PROMPTS, 5, repetition_penalty=1.3) == alone


def test_prompts_of_like_length_go_together_and_long_ones_alone() -> None:
    assert list(batches([5, 100, 6, 90], 2)) == [[0, 2], [3, 1]]
    assert list(batches([5, 100, 6, 90], 2, longest=95)) == [[0, 2], [1], [3]]
    many = list(batches([n * 37 % 101 for n in range(100)], 4))
    assert sorted(i for batch in many for i in batch) == list(range(100))
    assert max(map(max, many[:16])) < 64, "the first answers do not wait for the last prompts"


def test_prompts_from_every_kind_of_file(h: Any, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "One it is."},
        {"role": "user", "content": "And two?"},
    ]
    records = [
        {"prompt": "Hi", "completion": "never read"},
        {"messages": talk},
        {"messages": [*talk, {"role": "assistant", "content": "asked anew"}]},
        {"conversations": [{"from": "human", "value": "Who?"}]},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        "two\nlines",
    ]
    lines = oracle.write_jsonl(tmp_path / "prompts.jsonl", records)
    whole = tmp_path / "prompts.json"
    whole.write_text(json.dumps(records))
    plain = tmp_path / "prompts.txt"
    plain.write_text("\ufeffHi\r\n\r\nWho?\r\n", encoding="utf-8")
    options = ["--max-new-tokens", 4, "--json"]

    def asked(file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in h.run("generate", "base", "--prompts", file, *options).out.splitlines()]

    found = asked(lines)
    assert [a["prompt"] for a in found] == ["Hi", "And two?", "And two?", "Who?", "Add.\n\n1 1", "two\nlines"]
    assert found[1]["messages"] == talk == found[2]["messages"]
    assert found[1]["text"] == found[2]["text"]
    shown = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in talk) + "<|im_start|>assistant\n"
    raw = h.run("generate", "base", "-p", shown, "--raw", *options).json
    assert (raw["text"], raw["prompt_tokens"]) == (found[1]["text"], found[1]["prompt_tokens"])
    assert [a["text"] for a in asked(whole)] == [a["text"] for a in found]
    assert [a["prompt"] for a in asked(plain)] == ["Hi", "Who?"]


def test_what_is_wrong_with_prompts_is_said_by_number_and_all_at_once(h: Any, tmp_path: Path) -> None:
    said = h.run("generate", "base", "-p", "Hi", "-p", " ", "-p", "", code=2).err
    assert "prompt 2 is empty; prompt 3 is empty" in said
    said = h.run("generate", "base", "-p", "x" * 600, "-p", "Hi", "-p", "y" * 700, "--raw", code=2).err
    assert "prompt 1 has 600 tokens" in said
    assert "prompt 3 has 700 tokens" in said
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Hi"}\n{"txt": "x"}\n{"messages": [{"role": "assistant", "content": "x"}]}\n{"prompt"\n')
    said = h.run("generate", "base", "--prompts", bad, code=2).err
    assert all(f"line {number}" in said for number in (2, 3, 4)), said
    talk = oracle.write_jsonl(tmp_path / "talk.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    assert "line 1 is a conversation" in h.run("generate", "base", "--prompts", talk, "--raw", code=2).err
    h.run("generate", "base", "--prompts", tmp_path / "none.txt", code=3)
    (tmp_path / "empty.txt").write_text("\n")
    h.run("generate", "base", "--prompts", tmp_path / "empty.txt", code=2)
    h.run("generate", "base", "-p", "Hi", "--stop", "", code=2)
    h.run("generate", "base", "-p", "Hi", "--repetition-penalty", 0, code=2)


def test_answers_go_into_a_file_whole_or_not_at_all(h: Any, tmp_path: Path) -> None:
    asked = ["generate", "base", "-p", "Hi", "-p", "Who?", "--max-new-tokens", 6]
    lines = h.run(*asked, "--json").out
    text = h.run(*asked).out
    out = tmp_path / "answers.jsonl"
    assert h.run(*asked, "--output", out).out == f"wrote 2 answers to {out}\n"
    without_speed = [{**json.loads(line), "tokens_per_second": 0} for line in out.read_text().splitlines()]
    assert without_speed == [{**json.loads(line), "tokens_per_second": 0} for line in lines.splitlines()]
    assert len(h.run(*asked, "--output", out, "--json").out.splitlines()) == 2, "--json keeps its promise"
    h.run(*asked, "--output", tmp_path / "answers.txt")
    assert (tmp_path / "answers.txt").read_text() == text
    h.run(*asked, "--output", tmp_path / "no" / "answers.txt", code=3)
    h.run(*asked, "--output", tmp_path, code=2)
    h.run("generate", "base", "-p", "x" * 600, "--raw", "--output", tmp_path / "never.txt", code=2)
    assert not (tmp_path / "never.txt").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2", "tied"])
def test_live_writes_what_folded_writes(tiny_registry: Any, name: str) -> None:
    h = tiny_registry(name)
    h.add("style", seed=1)
    h.add("instruct", seed=2, target_modules=["q_proj", "embed_tokens"] if name == "tied" else "all-linear")
    stacked = h.load()
    folded = h.logits(stacked, "style:0.7+instruct")
    bare = h.logits(stacked, "base")
    stacked.use(h.plan("style:0.7+instruct"), live=True)
    assert oracle.relative(oracle.logits(stacked.model), folded, bare) < 1e-5
    stacked.use(h.plan("style"), live=True)
    style = oracle.logits(stacked.model)
    assert oracle.relative(style, h.live(("style", 1)), bare) < 1e-5
    assert torch.equal(h.logits(stacked, "base"), bare), "taken off, nothing is left"
    assert torch.equal(h.logits(stacked, "style:0.7+instruct"), folded)


def test_live_refuses_what_is_no_sum(h: Any) -> None:
    h.add("style", seed=1)
    h.add("whole", seed=2, modules_to_save=["lm_head"])
    assert "no --live" in h.run("generate", "style+whole", "-p", "Hi", "--live", code=4).err


def test_rounding_is_reported_where_there_is_some(h: Any) -> None:
    h.add("style", seed=1, scale=0.01)
    exact = h.run("generate", "style", "-p", "Hi", "--max-new-tokens", 2, "--json")
    assert exact.json["rounding_error"] < 1e-5
    assert "rounding" not in exact.err
    coarse = h.run("generate", "style", "-p", "Hi", "--max-new-tokens", 2, "--dtype", "bfloat16", "--json")
    assert coarse.json["rounding_error"] > 0.01
    assert "folding in bfloat16 loses" in coarse.err
    live = h.run("generate", "style", "-p", "Hi", "--max-new-tokens", 2, "--dtype", "bfloat16", "--live", "--json")
    assert live.json["rounding_error"] == 0
