"""Examples in rows: full, in order, and with no prediction across documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen3Config

from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.data.rows import collate, deal_row, pack, split_row


def example_of(length: int, first: int = 0) -> Example:
    ids = list(range(first, first + length))
    return Example(ids, [IGNORED, *ids[1:]])


def test_rows_are_full_in_order_and_hold_every_document_once() -> None:
    examples = [example_of(n, 100 * i) for i, n in enumerate((3, 7, 10, 2, 4, 4, 1))]
    rows = pack(examples, 10)
    assert [[examples.index(e) for e in row] for row in rows] == [[0, 1], [2], [3, 4, 5], [6]]
    assert sorted(id(e) for row in rows for e in row) == sorted(map(id, examples))
    assert all(sum(len(e.input_ids) for e in row) <= 10 for row in rows)
    assert list(rows) == list(pack(examples, 10))
    with pytest.raises(ValueError, match="does not fit"):
        pack(examples, 9)


def test_a_row_is_split_between_records() -> None:
    examples = [example_of(n, 100 * i) for i, n in enumerate((3, 7, 12, 2, 4, 5))]
    batch = collate(examples) | {"references": torch.arange(6.0), "desired": torch.arange(6) % 2 == 0}
    batch["swapped"] = collate(examples[:1])  # belongs to the micro-batch, not to one of its records
    for most, together, wanted in (
        (10, 1, [[0, 1], [2], [3, 4], [5]]),
        (1, 1, [[0], [1], [2], [3], [4], [5]]),
        (14, 2, [[0, 1], [2, 3], [4, 5]]),
        (33, 1, [[0, 1, 2, 3, 4, 5]]),
        (1, 4, [[0, 1, 2, 3], [4, 5]]),
    ):
        parts = split_row(batch, most, together=together)
        assert [part["references"].tolist() for part in parts] == wanted
        for part, numbers in zip(parts, wanted, strict=True):
            alone = collate([examples[number] for number in numbers])
            assert all(torch.equal(part[key], value) for key, value in alone.items())
            assert part["desired"].tolist() == [number % 2 == 0 for number in numbers]
    assert [part["input_ids"].tolist() for part in split_row(collate([Example([0, 0], [IGNORED] * 2)]), 1)] == [
        [[0, 0]]
    ]


def test_parts_are_of_like_length() -> None:
    batch = collate([example_of(4, 100 * i) for i in range(9)])
    assert [part["input_ids"].shape[1] for part in split_row(batch, 30)] == [20, 16]


def test_a_row_is_dealt_to_those_who_compute_at_once() -> None:
    examples = [example_of(n, 100 * i) for i, n in enumerate((3, 7, 12, 2, 4, 5))]  # 33 tokens
    batch = collate(examples) | {"references": torch.arange(6.0), "desired": torch.arange(6) % 2 == 0}
    for count, most, together, wanted in (
        (2, 20, 1, [[0, 1, 3, 5], [2, 4]]),
        (2, 12, 1, [[2], [1], [3, 5], [0, 4]]),
        (2, 10, 1, [[2], [1], [3, 5], [0, 4]]),
        (3, 12, 1, [[2], [3, 4, 5], [0, 1]]),
        (2, 20, 2, [[0, 1, 4, 5], [2, 3]]),
        (2, 5, 1, [[2], [1], [5], [4], [0], [3]]),
    ):
        parts = deal_row(batch, count, most, together=together)
        if together == 1:
            assert all(part["input_ids"].numel() <= most or part["references"].numel() == 1 for part in parts)
        lengths = [part["input_ids"].numel() for part in parts]
        assert lengths == sorted(lengths, reverse=True)
        assert sorted(record for part in parts for record in part["references"].tolist()) == list(range(6))
        assert [part["references"].tolist() for part in parts] == wanted, (count, most)
        for part in parts:
            alone = collate([examples[int(number)] for number in part["references"]])
            assert all(torch.equal(part[key], value) for key, value in alone.items())
    assert len(deal_row(collate(examples[:1]), 2, 50)) == 1


def test_collate_keeps_no_prediction_across_examples() -> None:
    batch = collate([Example([5, 6, 7], [IGNORED, 6, IGNORED]), Example([8, 9], [8, 9])])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["keep"].tolist() == [0, 3]
    assert batch["labels"].tolist() == [6, 9]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert [tuple(tensor.shape) for tensor in collate([]).values()] == [(1, 0), (1, 0), (0,), (0,)]


TINY: dict[str, Any] = {
    "llama": LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "qwen3": Qwen3Config(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", TINY)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_of_a_row_is_the_sum_of_its_examples_alone(architecture: str, attention: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(TINY[architecture], attn_implementation=attention).float()
    for parameter in model.parameters():  # initialisations are too small for attention to matter
        torch.nn.init.normal_(parameter, std=0.3)
    model.train(False)
    examples = []
    for length in (9, 1, 2, 17, 5):
        ids = torch.randint(0, 97, (length,)).tolist()
        mask = torch.rand(length).tolist()
        labels = [IGNORED if not i or mask[i] < 0.4 else token for i, token in enumerate(ids)]
        examples.append(Example(ids, labels))
    batch = collate(examples)
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            logits_to_keep=batch["keep"],
            use_cache=False,
        ).logits
        together = functional.cross_entropy(logits[0].double(), batch["labels"], reduction="sum")
        alone = torch.zeros((), dtype=torch.float64)
        for example in examples:
            full = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].double()
            alone += functional.cross_entropy(full, torch.tensor(example.labels)[1:], reduction="sum")
    assert logits.shape == (1, batch["labels"].numel(), 97)
    assert float(together) == pytest.approx(float(alone), rel=1e-5)
    assert batch["labels"].numel() == sum(label != IGNORED for e in examples for label in e.labels)
