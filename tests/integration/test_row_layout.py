"""Records that share a row: the loss and the gradient are those of the records alone, on many architectures."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import SIZES, long_rope, made_of
from tiny_registry import TEXTS, TinyRegistry
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    PhiConfig,
)  # fmt: skip

from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.data.rows import collate
from stackctl.engine.loss import segment_attention as attention
from stackctl.engine.loss.logits import supervised_loss
from stackctl.engine.loss.row_layout import choose_layout
from stackctl.engine.training.lora_sum import add_in_place

_SMALL = SIZES | {"max_position_embeddings": 256}
CONFIGS: dict[str, Any] = {
    "phi": PhiConfig(**_SMALL, resid_pdrop=0.0, embd_pdrop=0.0),
    "mistral, window 16": MistralConfig(**_SMALL, sliding_window=16),
    "gemma2": Gemma2Config(**_SMALL, head_dim=8, sliding_window=16),
    "gemma3, window 16": Gemma3TextConfig(**_SMALL, head_dim=8, sliding_window=16),
    "phi3, other angles beyond 50": long_rope(50),
    "phi3, other angles beyond 100": long_rope(100),
}
EXPECTED = {
    "gemma2": "mask",  # its attention caps the logits, which PyTorch's cannot
    "phi3, other angles beyond 50": "one_by_one",  # all positions of a row are turned as those of its longest record
}


def examples(count: int = 5, *, longest: int = 70) -> list[Example]:
    """Records of uneven lengths, of which some tokens are supervised."""
    generator = random.Random(0)
    made = []
    for number in range(count):
        length = longest if not number else generator.randrange(2, longest)
        ids = [generator.randrange(2, 256) for _ in range(length)]  # 1 is an image to Chameleon
        labels = [IGNORED, *(token if generator.random() < 0.6 else IGNORED for token in ids[1:-1]), ids[-1]]
        made.append(Example(ids, labels[:length]))
    return made


def model_of(name: str, models: Any) -> Any:
    if name in CONFIGS:
        model = made_of(CONFIGS[name])
    elif name == "chameleon":
        model = architectures.tiny_model(name)
    else:
        model = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32)
    model.requires_grad_(False)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted.eval()


def gradients(model: Any) -> torch.Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    model.zero_grad()
    return found


def alone(model: Any, rows: list[Example]) -> tuple[float, torch.Tensor]:
    """The reference: transformers' own loss of each record by itself, unpadded, and the gradient of their sum."""
    total = 0.0
    for example in rows:
        count = sum(label != IGNORED for label in example.labels[1:])
        loss = model(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss * count
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


ARCHITECTURES = ["llama", "tied", "qwen2", "qwen3", "mistral", "gemma", "gpt2", "neox", "phi3", "mixtral", *CONFIGS]


def watch_tokens(model: Any) -> list[int]:
    """How many tokens each forward pass from now on has."""
    computed: list[int] = []
    embedding = model.get_base_model().get_input_embeddings()
    embedding.register_forward_hook(lambda _, given, __: computed.append(given[0].numel()))
    return computed


def check_row(name: str, model: Any, rows: list[Example]) -> tuple[str, int]:
    """Loss and gradient of a row are those of its records alone; returns the layout, and the tokens computed for it."""
    expected, expected_gradient = alone(model, rows)
    layout = choose_layout(model, rows, longest=70)
    supervised_loss(model, collate(rows[:1]))  # the first time looks for the head
    computed = watch_tokens(model)
    loss = supervised_loss(model, collate(rows), one_by_one=layout == "one_by_one")
    loss.backward()
    gradient = gradients(model)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-4
    assert layout == EXPECTED.get(name, "per_record")
    return layout, sum(computed)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_of_a_row_is_that_of_its_records_alone(name: str, models: Any) -> None:
    check_row(name, model_of(name, models), examples())


def alike() -> list[Example]:
    """Records that begin alike: two with a question of 20 tokens and an answer each, twice; one of these again; and one
    that goes on from another one."""
    chosen = examples(6, longest=30)
    system, question, other = (chosen[number].input_ids[:10] for number in (0, 1, 2))
    made = []
    for number, beginning in enumerate([[*system, *question]] * 2 + [[*system, *other]] * 2):
        ids = [*beginning, *[100 + number] * 2, *chosen[number].input_ids]
        made.append(Example(ids, [IGNORED] * len(beginning) + ids[len(beginning) :]))
    longer = [*made[0].input_ids, *chosen[5].input_ids]
    return [*made, chosen[3], Example(made[1].input_ids, made[1].input_ids), Example(longer, longer)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_what_records_begin_with_is_computed_once_and_changes_no_number(name: str, models: Any) -> None:
    rows = alike()
    layout, computed = check_row(name, model_of(name, models), rows)
    every = [tuple(row.input_ids[:length]) for row in rows for length in range(1, len(row.input_ids) + 1)]
    assert computed == len(set(every) if layout == "per_record" else every)


def test_a_row_may_be_longer_than_what_a_model_reads_at_once() -> None:
    """GPT-Neo keeps a causal mask of its context's size, which a row of its own mask cannot exceed."""
    model = architectures.tiny_model("gpt_neo", max_position_embeddings=80).eval()
    rows = examples(longest=70)
    assert sum(len(row.input_ids) for row in rows) > 80
    layout = choose_layout(model, rows, longest=70)
    loss = supervised_loss(model, collate(rows), one_by_one=layout == "one_by_one")
    assert float(loss.detach()) == pytest.approx(alone(model, rows)[0], rel=1e-5)


def drop_before_the_adapter(model: Any, share: float) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj.lora_dropout["default"] = torch.nn.Dropout(share)


def drop_in_attention(model: Any, share: float) -> None:
    """By a function that is given a number, as transformers does it."""
    model.get_base_model().model.layers[1].self_attn.attention_dropout = share


@pytest.mark.parametrize("drop", [drop_before_the_adapter, drop_in_attention])
def test_dropout_is_drawn_for_each_record_by_itself(drop: Any, models: Any) -> None:
    model = model_of("llama", models)
    rows = alike()
    assert choose_layout(model, rows, longest=70) == "per_record"
    supervised_loss(model, collate(rows[:1]))
    computed = watch_tokens(model)
    for dropped, training in ((0.0, True), (0.5, False), (0.5, True)):
        drop(model, dropped)
        model.train(training)
        supervised_loss(model, collate(rows))
    assert computed[0] == computed[1] < computed[2] == sum(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi"])  # without and with a bias, and transposed weights
@pytest.mark.parametrize("autocast", [False, True])
def test_adding_in_place_changes_no_number(name: str, autocast: bool, models: Any) -> None:
    model = model_of(name, models)
    batch = collate(examples())

    def computed() -> tuple[float, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = supervised_loss(model, batch)
        loss.backward()
        return float(loss.detach()), gradients(model)

    expected, expected_gradient = computed()
    add_in_place(model)
    assert sum(bool(getattr(layer, "lora_variant", None)) for layer in model.modules()) >= 8
    loss, gradient = computed()
    tolerance = 3e-2 if autocast else 1e-6
    assert loss == pytest.approx(expected, rel=tolerance)
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < tolerance


def test_adding_in_place_keeps_dropout_and_other_adapters(models: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(models("llama"), dtype=torch.float32)
    settings = {"target_modules": "all-linear", "lora_dropout": 0.5, "init_lora_weights": False}
    model: Any = get_peft_model(base, LoraConfig(r=4, **settings))
    model.add_adapter("frozen", LoraConfig(r=2, **settings))
    model.base_model.set_adapter(["frozen", "default"])
    model.train()
    batch = collate(examples())
    torch.manual_seed(3)
    expected = float(supervised_loss(model, batch).detach())
    add_in_place(model)
    assert {name for layer in model.modules() for name in getattr(layer, "lora_variant", ())} == {"default"}
    torch.manual_seed(3)
    assert float(supervised_loss(model, batch).detach()) == pytest.approx(expected, rel=1e-6)


def test_a_window_that_is_lost_is_seen(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that forgot the window would pass on short records; the probe is longer than the window."""
    model = model_of("mistral, window 16", models)
    right = attention.segment_attention

    def windowless(*arguments: Any, sliding_window: int | None = None, **options: Any) -> Any:
        return right(*arguments, **options)

    attention.AttentionInterface.register(attention.SEGMENTS, windowless)
    try:
        assert choose_layout(model, examples(), longest=70) == "mask"
        assert choose_layout(model, examples(longest=16), longest=16) == "per_record"  # no record feels it
    finally:
        attention.AttentionInterface.register(attention.SEGMENTS, right)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("doge", {"keep_window_size": 60}),
        ("glm_moe_dsa", {"index_topk": 60}),
        (
            "minimax_m3_vl_text",
            {"layer_types": ["minimax_m3_sparse", "full_attention"], "index_block_size": 32, "index_topk_blocks": 2},
        ),
    ],
)
def test_a_bound_on_what_a_token_sees_is_felt_whatever_its_name(name: str, bounds: dict[str, Any]) -> None:
    """An indexer chooses among all columns of a row, and none of it shows on records within its bound."""
    for longest in (50, 150):
        model = architectures.tiny_model(name, **bounds).eval()
        rows = examples(longest=longest)
        one_by_one = choose_layout(model, rows, longest=longest) == "one_by_one"
        with torch.no_grad():
            loss = float(supervised_loss(model, collate(rows), one_by_one=one_by_one))
            expected = sum(float(supervised_loss(model, collate([row]))) for row in rows)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert one_by_one == (longest == 150)


@pytest.mark.parametrize("name", ["llama", "chameleon"])
def test_a_model_that_mixes_the_records_of_a_row_runs_them_apart(name: str, models: Any) -> None:
    """A state that runs through the row, as in a recurrent model, whatever the attention.

    Chameleon rules a token out by the lowest number there is, beside which nothing differs.
    """
    model = model_of(name, models)

    def leak(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 0.1 * output.cumsum(1)

    model.get_base_model().get_input_embeddings().register_forward_hook(leak)
    rows = examples()
    assert choose_layout(model, rows, longest=70) == "one_by_one"
    expected, _ = alone(model, rows)
    with torch.no_grad():
        assert float(supervised_loss(model, collate(rows), one_by_one=True)) == pytest.approx(expected, rel=1e-5)
        assert float(supervised_loss(model, collate(rows))) != pytest.approx(expected, rel=1e-4)


def test_what_is_ruled_out_hides_no_effect(tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of Chameleon are those of transformers, and by how much a stack moves its logits is told."""
    h = TinyRegistry(run, architectures.tiny_folder("chameleon", tmp_path / "tiny"), tmp_path, monkeypatch)
    plain = AutoModelForImageTextToText.from_pretrained(h.base, dtype=torch.float32)
    rows = [torch.tensor([oracle.label(record)[0]]) for record in TEXTS]
    with torch.no_grad():
        losses = [float(plain(input_ids=ids, labels=ids).loss) for ids in rows]
    counts = [ids.shape[1] - 1 for ids in rows]
    wanted = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert run("eval", "base", "--data", h.data(TEXTS), "--json").json["results"][0]["loss"] == pytest.approx(wanted)
    h.train("style", "--max-steps", 2, "--dtype", "float32", records=TEXTS)
    assert h.log("style")[0]["loss"] == pytest.approx(wanted, rel=1e-5)
    said = run("train", "new", "--on", "style", "--data", h.data(TEXTS), "--max-steps", 1).err
    moved = re.search(r"it moves the logits by ([0-9.]+)%", said)
    assert moved and float(moved[1]) > 1


def test_no_mask_of_all_pairs_is_made(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every attention gets one record, without a mask."""
    model = model_of("llama", models)
    rows = examples()
    assert choose_layout(model, rows, longest=70) == "per_record"
    supervised_loss(model, collate(rows))  # the first time looks for the head
    seen: list[tuple[int, bool]] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def watch(query: torch.Tensor, *arguments: Any, attn_mask: Any = None, **options: Any) -> torch.Tensor:
        seen.append((query.shape[2], attn_mask is not None))
        return real(query, *arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    supervised_loss(model, collate(rows))
    assert seen == [(len(example.input_ids), False) for example in rows] * 2  # two layers


def test_padding_and_a_cache_still_work_under_it(models: Any) -> None:
    """What is not a row of records gets the mask that PyTorch's attention would get."""
    folder: Path = models("mistral")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11], [257, 257, 1, 2, 3]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation(attention.SEGMENTS)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), wanted)


def test_gradient_checkpointing_changes_memory_alone(h: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same weights; layers run again on the way back."""
    h.add("style", seed=1)
    calls: list[bool] = []
    right = attention.segment_attention

    def counted(module: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        calls.append(module.training)
        return right(module, *arguments, **options)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.SEGMENTS, counted)
    h.train("plain", "--max-steps", 2, on="style")
    once = sum(calls)
    calls.clear()
    h.train("again", "--max-steps", 2, "--gradient-checkpointing", on="style")
    assert sum(calls) == 2 * once
    weights = "adapter_model.safetensors"
    assert h.bytes_of("again")[weights] == h.bytes_of("plain")[weights]


def test_short_records_attend_in_float32_in_training_under_autocast() -> None:
    """In two bytes a value a CPU takes several times as long for them, on the way back."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2))

    def attended(lengths: list[int], **autocast: bool) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, **autocast):
            return attention.segment_attention(torch.nn.Module(), q, k, v, None, segment_lengths=lengths)[0]

    short, long = [100, 200], [300]
    assert torch.equal(attended(short), attended(short, enabled=False))
    assert attended(long).dtype == torch.bfloat16 or not torch.equal(attended(long), attended(long, enabled=False))
    with torch.no_grad():
        assert not torch.equal(attended(short), attended(short, enabled=False))
