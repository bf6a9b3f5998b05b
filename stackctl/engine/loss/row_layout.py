"""How the records of a micro-batch share a row: the fastest way that leaves a model's numbers what they are.

Models differ in what they make of records in a row, so this looks instead of believing: two records are put through
the model together, and each by itself with the model's own attention, and the logits must agree.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from stackctl.engine.base.configuration import longrope_lengths
from stackctl.engine.data.examples import IGNORED, Example
from stackctl.engine.data.rows import collate
from stackctl.engine.loss.logits import causal_lm, difference, supervised_logits
from stackctl.engine.loss.segment_attention import ONE_CALL, SEGMENTS, has_one_call
from stackctl.engine.models import evaluating
from stackctl.engine.tensors import without_ruled_out

RowLayout = Literal["per_record", "one_call", "flash", "mask", "one_by_one"]
"""Attention record by record; of all records in one call, PyTorch's or the package flash-attn's; a mask of all pairs in
the row; or records run one by one."""

_IMPLEMENTATIONS: dict[RowLayout, str] = {
    "flash": "flash_attention_2", "one_call": ONE_CALL, "per_record": SEGMENTS
}  # fmt: skip
_COUNTS_TOKENS = re.compile("window|chunk|block|budget|topk|top_k")
"""In the names of windows, of chunks, and of how many tokens or blocks an indexer chooses for each to see."""
_TOKENS = 48
_BEYOND = 32
"""By how much a probe is longer than what a model attends to at once, so that a window that was lost shows."""
_ALIKE = 8
"""Tokens that both probes begin with."""


def choose_layout(model: nn.Module, examples: Sequence[Example], *, longest: int) -> RowLayout:
    """Give ``model`` the fastest attention that agrees with its own, and say which that is.

    ``longest`` is the length in tokens of the longest record to come.
    """
    inner = causal_lm(model)
    own = inner.config._attn_implementation
    pair = _probe(inner, examples, longest)
    with evaluating(model):
        alone = torch.cat([_logits(model, [example]) for example in pair])
        tolerance = 1e-3 if alone.dtype == torch.float32 else 3e-2

        def agrees() -> bool:
            return difference(_logits(model, pair).float(), alone.float()) <= tolerance

        for layout in _faster(inner, own):
            with contextlib.suppress(Exception):  # a forward that wants a mask, a machine without the kernel
                inner.set_attn_implementation(_IMPLEMENTATIONS[layout])
                if agrees():
                    return layout
            inner.set_attn_implementation(own)
        return "mask" if not _bounds_rows(inner) and agrees() else "one_by_one"


def _bounds_rows(inner: PreTrainedModel) -> bool:
    """Whether a model keeps its causal mask, (T, T), as GPT-Neo does: no row can be longer, however short its records
    are."""
    return any(buffer.ndim > 1 and buffer.shape[-1] == buffer.shape[-2] > 1 for buffer in inner.buffers())


def _faster(inner: PreTrainedModel, own: str | None) -> Iterator[RowLayout]:
    """What may take the place of PyTorch's attention; a model that runs another one has its reasons."""
    if own == "sdpa":
        if inner.device.type == "cuda" and inner.dtype != torch.float32 and is_flash_attn_2_available():
            yield "flash"
        if has_one_call(inner.device, inner.dtype):
            yield "one_call"
        yield "per_record"


def _probe(inner: PreTrainedModel, examples: Sequence[Example], longest: int) -> list[Example]:
    """Two records made of the data's tokens that begin alike, the first longer than any bound that one of them exceeds.

    What they have in common is computed once where the attention knows of it, so that this is looked at as well.
    """
    exceeded = [bound + _BEYOND for bound in _bounds(inner.config.get_text_config()) if bound < longest]
    tokens = itertools.cycle([token for example in examples[:2] for token in example.input_ids])
    first = list(itertools.islice(tokens, min(max([_TOKENS, *exceeded]), longest)))
    second = [*first[:_ALIKE], *itertools.islice(tokens, _TOKENS // 2 - _ALIKE)][:longest]
    return [Example(ids, [IGNORED, *ids[1:]]) for ids in (first, second)]


def _bounds(config: Any) -> list[int]:
    """Lengths in tokens beyond which a model may compute otherwise: whatever its configuration counts tokens by."""
    counts = {name: value for name, value in vars(config).items() if type(value) is int and _COUNTS_TOKENS.search(name)}
    blocks = counts.get("index_block_size", 0) * counts.get("index_topk_blocks", 0)
    return [*counts.values(), blocks, *longrope_lengths(config)]


def _logits(model: nn.Module, rows: list[Example]) -> Tensor:
    device = next(model.parameters()).device
    batch: dict[str, Any] = {key: value.to(device) for key, value in collate(rows).items()}
    return without_ruled_out(supervised_logits(model, batch))
