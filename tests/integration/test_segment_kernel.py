"""All records of a row in one call: what the kernel is given, and the numbers, by a kernel that a CPU can run.

The stand-in takes what ``torch.nn.attention.varlen.varlen_attn`` takes, refuses what that refuses, and computes each
record's softmax in float64, written out.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import SIZES
from tiny_registry import CHAT
from torch import Tensor
from torch.nn.attention import varlen
from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.data.rows import collate
from stackctl.engine.loss import row_layout
from stackctl.engine.loss import segment_attention as attention
from stackctl.engine.loss.logits import supervised_loss

REAL = inspect.signature(varlen.varlen_attn)
LENGTHS = [5, 1, 17, 30]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral, window 16": MistralConfig(**SIZES, sliding_window=16),
    "gemma3, window 16": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16),
}


def plain(query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """Attention record by record, in the arguments of the real kernel."""
    given = REAL.bind(query, key, value, *arguments, **options)
    given.apply_defaults()
    told = given.arguments
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert query.ndim == key.ndim == value.ndim == 3
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    ends = told["cu_seq_q"]
    assert ends.dtype == torch.int32
    assert ends is told["cu_seq_k"]
    assert (int(ends[0]), int(ends[-1])) == (0, query.shape[0])
    sizes = ends.diff().tolist()
    assert told["max_q"] == told["max_k"] == max(sizes)
    heads, groups = query.shape[1], key.shape[1]
    assert told["enable_gqa"] is (heads != groups)
    before, after = told["window_size"]
    assert after == 0
    parts = []
    for q, k, v in zip(*(states.double().split(sizes) for states in (query, key, value)), strict=True):
        k, v = (states.repeat_interleave(heads // groups, 1) for states in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) * (told["scale"] or q.shape[-1] ** -0.5)
        place = torch.arange(len(q))
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & ((behind <= before) if before >= 0 else True)
        parts.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
    return torch.cat(parts).to(query.dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each call of the kernel had."""
    seen: list[int] = []

    def watched(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *more: Any, **options: Any) -> Tensor:
        seen.append(len(ends) - 1)
        return plain(query, key, value, ends, *more, **options)

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    return seen


@pytest.mark.parametrize("window", [None, 1, 4, 16, 30, 64])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_it_is_the_loop(calls: list[int], groups: int, window: int | None) -> None:
    torch.manual_seed(0)
    states = [torch.randn(1, heads, sum(LENGTHS), 8, dtype=torch.bfloat16) for heads in (4, groups, groups)]
    options: dict[str, Any] = {"scaling": 0.3, "segment_lengths": LENGTHS, "sliding_window": window}
    one, _ = attention.one_call_attention(torch.nn.Module(), *states, None, **options)
    assert calls == [len(LENGTHS)]
    exact, _ = attention.segment_attention(torch.nn.Module(), *(s.double() for s in states), None, **options)
    assert one.shape == exact.shape
    assert float((one.double() - exact).abs().max()) < 0.02


@pytest.mark.parametrize("window", [None, 16])
def test_it_is_the_loop_where_records_share_pieces(calls: list[int], window: int | None) -> None:
    torch.manual_seed(0)
    lengths, paths = [10, 5, 7, 3, 20], [[0, 1], [0, 1], [0, 2, 3], [0, 2], [4]]
    states = [torch.randn(1, heads, sum(lengths), 8, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    options: dict[str, Any] = {"segment_lengths": lengths, "segment_paths": paths, "sliding_window": window}
    one, _ = attention.one_call_attention(torch.nn.Module(), *states, None, **options)
    assert calls == [3], "what is no record's own is left out"
    exact, _ = attention.segment_attention(torch.nn.Module(), *(s.double() for s in states), None, **options)
    assert one.shape == exact.shape == (1, sum(lengths), 4, 8)
    assert float((one.double() - exact).abs().max()) < 0.02


@pytest.mark.parametrize(
    ("dtype", "width", "options"),
    [(torch.float32, 8, {}), (torch.bfloat16, 264, {}), (torch.bfloat16, 8, {"dropout": 0.5})],
)
def test_what_the_kernel_cannot_do_goes_by_the_loop(
    calls: list[int], dtype: torch.dtype, width: int, options: dict[str, Any]
) -> None:
    states = [torch.randn(1, 2, sum(LENGTHS), width, dtype=dtype) for _ in range(3)]
    found, _ = attention.one_call_attention(torch.nn.Module(), *states, None, segment_lengths=LENGTHS, **options)
    assert calls == []
    assert found.shape == (1, sum(LENGTHS), 2, width)


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(CONFIGS[name])](copy.deepcopy(CONFIGS[name])).to(torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()


def rows() -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Example(tokens, [IGNORED, *tokens[1:]]) for tokens in ids]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_chooses_it_by_its_logits(calls: list[int], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = model_of(name)
    alone = sum(supervised_loss(model, collate([row])).item() for row in rows())
    monkeypatch.setattr(row_layout, "has_one_call", lambda device, dtype: True)
    assert row_layout.choose_layout(model, rows(), longest=max(LENGTHS)) == "one_call"
    calls.clear()
    together = supervised_loss(model, collate(rows())).item()
    assert set(calls) == {len(LENGTHS)}
    assert together == pytest.approx(alone, rel=2e-3)


def test_a_kernel_that_is_wrong_or_missing_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel image is available")

    def forgetful(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, *more: Any, **options: Any) -> Tensor:
        whole = torch.tensor([0, query.shape[0]], dtype=torch.int32)
        return plain(query, key, value, whole, whole, query.shape[0], query.shape[0], **options)

    monkeypatch.setattr(row_layout, "has_one_call", lambda device, dtype: True)
    for kernel in (missing, forgetful):
        monkeypatch.setattr(varlen, "varlen_attn", kernel)
        assert row_layout.choose_layout(model_of("llama"), rows(), longest=max(LENGTHS)) == "per_record"


def test_a_run_in_bfloat16_passes_its_proofs_and_eval_shares_rows_by_it(
    calls: list[int], tiny_registry: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel rounds otherwise than the attention by which the frozen stack was looked at before."""
    h = tiny_registry("llama")
    h.add("style", seed=1)
    monkeypatch.setattr(row_layout, "has_one_call", lambda device, dtype: True)
    data = h.data(CHAT)
    h.train("new", "--max-steps", 1, "--dtype", "bfloat16", on="style")
    assert max(calls) > 1
    losses = {}
    for kernel in (True, False):
        calls.clear()
        monkeypatch.setattr(row_layout, "has_one_call", lambda device, dtype, kernel=kernel: kernel)
        report = h.run("eval", "style+new", "--data", data, "--dtype", "bfloat16", "--json").json
        losses[kernel] = report["results"][0]["loss"]
        assert (max(calls, default=0) > 1) is kernel
    assert losses[True] == pytest.approx(losses[False], rel=5e-3)


def test_only_a_gpu_and_weights_of_two_bytes_are_asked() -> None:
    assert not attention.has_one_call(torch.device("cpu"), torch.bfloat16)
    assert not attention.has_one_call(torch.device("cuda"), torch.float32)
    assert attention.has_one_call(torch.device("cuda"), torch.bfloat16)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_real_kernel_has_the_numbers_of_the_loop_and_its_gradient(name: str) -> None:
    model = model_of(name).cuda()
    batch = {key: value.cuda() for key, value in collate(rows()).items()}
    found = {}
    for kind in attention.OWN:
        model.get_base_model().set_attn_implementation(kind)
        model.zero_grad()
        loss = supervised_loss(model, batch)
        loss.backward()
        found[kind] = loss.item(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    (loop, wanted), (once, got) = found.values()
    assert once == pytest.approx(loop, rel=2e-3)
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm()) <= 0.05 * float(b.norm()) + 1e-6
