"""Attention of the records in a row: each within itself, causal, without any mask.

transformers keeps records that share a row apart by a mask of all pairs of tokens, which costs the square of the row.
Here every record is a causal attention of its own, so that a row costs what its records cost one by one. It takes the
place of PyTorch's scaled dot product attention only; whether a model's numbers stay what they were is looked at before
training (:func:`stackctl.engine.row_layout.choose_layout`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

SEGMENTS = "stackctl_segments"
"""What this attention is called inside transformers."""


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: list[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query`` (1, heads, T, d), ``key`` and ``value`` (1, groups, T, d) to (1, T, heads, d).

    ``segment_lengths`` sum to T; without them the row is one record. A ``sliding_window`` is a token and those before
    it, as many as it says in all.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = segment_lengths or [query.shape[2]]
    outputs = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        length = q.shape[2]
        windowed = sliding_window is not None and length > sliding_window
        outputs.append(
            functional.scaled_dot_product_attention(
                q, k, v,
                attn_mask=_band(length, sliding_window, q.device) if windowed else None,
                dropout_p=dropout, is_causal=not windowed, scale=scaling,
            ).transpose(1, 2)
        )  # fmt: skip
    return torch.cat(outputs, 1), None


def _band(length: int, width: int | None, device: torch.device) -> Tensor:
    """(T, T): True where a token sees another, which is itself and the ``width - 1`` before it."""
    place = torch.arange(length, device=device)
    behind = place[:, None] - place[None, :]
    return (behind >= 0) & (behind < (width or length))


def _segment_mask(
    batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **options: Any
) -> Tensor | None:
    """No mask for a row of records; what PyTorch's attention would get where there is padding or a cache."""
    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(batch_size, q_length, kv_length, attention_mask=attention_mask, **options)


AttentionInterface.register(SEGMENTS, segment_attention)
AttentionMaskInterface.register(SEGMENTS, _segment_mask)
