"""Tokens that a base never learned: told from rows alone, and only where they can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import oracle
import pytest
import torch
from tiny import tiny_tokenizer, untrained_base

from stackctl.engine.base.untrained_tokens import reference_tokens, untrained_tokens

USED, UNUSED = list(range(200)), list(range(300, 340))


def rows(kind: str) -> torch.Tensor:
    """(340, 64): 0-199 used, 250-259 to look at, of which the odd ones are as the unused 300-339 are."""
    torch.manual_seed(0)
    matrix = torch.randn(340, 64) * 0.02
    scale = torch.rand(300, 1) * 2 + 1
    spread, middle = {"larger": (0.06, 0.01), "smaller": (0.002, 0.003)}.get(kind, (0.02, 0.01))
    matrix[:300] = torch.randn(300, 64) * spread * scale + middle
    if kind == "constant":
        matrix[300:] = 0.003
    matrix[251:260:2] = matrix[300] if kind == "constant" else torch.randn(5, 64) * 0.02
    return matrix


@pytest.mark.parametrize("kind", ["larger", "smaller", "constant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_lie_as_the_unused_ones_do(kind: str, dtype: torch.dtype) -> None:
    found = untrained_tokens([rows(kind).to(dtype)], range(250, 260), USED, UNUSED)
    assert found == [251, 253, 255, 257, 259]


def test_one_of_two_matrices_is_enough() -> None:
    trained = rows("larger")
    trained[251:260:2] = trained[:5]
    assert untrained_tokens([trained], range(250, 260), USED, UNUSED) == []
    assert untrained_tokens([trained, rows("larger")], range(250, 260), USED, UNUSED) == [251, 253, 255, 257, 259]


def test_what_cannot_be_told_is_not_said() -> None:
    """A model of which every row is as it was initialised, and one with hardly a row that is surely unused."""
    torch.manual_seed(0)
    assert untrained_tokens([torch.randn(340, 64)], range(250, 260), USED, UNUSED) == []
    assert untrained_tokens([rows("larger")], range(250, 260), USED, UNUSED[:7]) == []


@pytest.mark.parametrize("learned", [False, True])
def test_training_says_which_tokens_of_the_template_it_cannot_teach(run: Any, tmp_path: Path, learned: bool) -> None:
    folder = untrained_base(tmp_path / "model", learned=learned)
    used, unused = reference_tokens(tiny_tokenizer(), 288)
    assert unused == list(range(258, 288))
    assert len(used) > 30
    run("init")
    ran = run("base", "add", "b", folder)
    assert ("<|im_start|>, <|im_end|>" in ran.err) != learned
    chat = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]}]
    data = oracle.write_jsonl(tmp_path / "chat.jsonl", chat)
    ran = run("train", "x", "--base", "b", "--data", data, "--max-steps", 1)
    said = "never learned <|im_start|>, <|im_end|>"
    assert (said in " ".join(ran.err.split())) != learned
    found = run("inspect", "b", "--json").json["untrained_tokens"]
    assert found == ([] if learned else ["<|im_start|>", "<|im_end|>"])
    text = oracle.write_jsonl(tmp_path / "text.jsonl", [{"text": "No chat at all."}])
    assert "never learned <|im_start|>" not in run("train", "y", "--base", "b", "--data", text, "--max-steps", 1).err


def test_a_head_of_fewer_rows_than_the_embedding(run: Any, tmp_path: Path) -> None:
    """What CPM-Ant's prompts have in the embedding is not looked for behind the head."""
    run("init")
    run("base", "add", "b", architectures.tiny_folder("cpmant", tmp_path / "model"))
    assert run("inspect", "b", "--json").json["untrained_tokens"] == []
