"""Attention of the records in a row: each within itself, causal, without any mask.

transformers keeps records that share a row apart by a mask of all pairs of tokens, which costs the square of the row.
Here every record is a causal attention of its own, so that a row costs what its records cost one by one. It takes the
place of PyTorch's scaled dot product attention only; whether a model's numbers stay what they were is looked at before
training (:func:`stackctl.engine.loss.row_layout.choose_layout`).

There are two: a loop over the records, and on a GPU one call for all of them, PyTorch's own flash attention for rows of
uneven lengths (``torch.nn.attention.varlen``).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

try:
    from torch.nn.attention import varlen
except ImportError:  # before torch 2.10
    varlen = None  # type: ignore[assignment]

SEGMENTS = "stackctl_segments"
"""What the loop over the records is called inside transformers."""
ONE_CALL = "stackctl_one_call"
"""What the one call for all records is called there."""
OWN = (SEGMENTS, ONE_CALL)
_HALVES = (torch.float16, torch.bfloat16)
_SHORT = 256
"""Tokens up to which attention and its way back take less time in float32 than in two bytes a value on a CPU: measured
for nine heads of 64 with 32, 64, 150 and 300 tokens, 0.3, 0.3, 0.5 and 1.0 of it."""
_WIDEST_HEAD = 256
"""Values of a head that PyTorch's flash attention takes at most."""


@dataclass(frozen=True)
class _Row:
    """Records that consist of pieces of a row: how many tokens each piece has, and which pieces each record.

    The last ``own`` tokens of a record are those that no earlier one has; in the row they follow one another. A record
    without any is left out.
    """

    lengths: Sequence[int]
    paths: Sequence[Sequence[int]]
    own: Sequence[int]

    @classmethod
    def of(cls, lengths: Sequence[int], paths: Sequence[Sequence[int]] | None) -> _Row:
        if paths is None:
            return cls(lengths, [[piece] for piece in range(len(lengths))], lengths)
        kept, own, seen = [], [], 0
        for path in paths:
            if new := [piece for piece in path if piece >= seen]:
                kept.append(path)
                own.append(sum(lengths[piece] for piece in new))
                seen += len(new)
        return cls(lengths, kept, own)

    @property
    def _shares(self) -> bool:
        return any(len(path) > 1 for path in self.paths)

    @property
    def totals(self) -> tuple[int, ...]:
        """The tokens of each record."""
        return tuple(sum(self.lengths[piece] for piece in path) for path in self.paths)

    def records(self, states: Tensor, dim: int) -> list[Tensor]:
        """What belongs to each record, of something that has the row's tokens along ``dim``."""
        pieces = states.split(list(self.lengths), dim)
        return [pieces[path[0]] if len(path) == 1 else torch.cat([pieces[n] for n in path], dim) for path in self.paths]

    def laid_out(self, states: Tensor) -> Tensor:
        """The records one behind another, of something that has the row's tokens first."""
        return torch.cat(self.records(states, 0)) if self._shares else states

    def own_of(self, states: Tensor) -> Tensor:
        """The reverse: the row out of its records."""
        if not self._shares:
            return states
        records = states.split(list(self.totals))
        return torch.cat([record[len(record) - own :] for record, own in zip(records, self.own, strict=True)])


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: list[int] | None = None,
    segment_paths: list[list[int]] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """``query`` (1, heads, T, d), ``key`` and ``value`` (1, groups, T, d) to (1, T, heads, d).

    ``segment_lengths`` sum to T; without them the row is one record. Each is a record, or with ``segment_paths`` a
    piece of those that are named there (:class:`stackctl.engine.data.shared_beginnings.SharedRow`). A
    ``sliding_window`` is a token and those before it, as many as it says in all.
    """
    if attention_mask is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    row = _Row.of(segment_lengths or [query.shape[2]], segment_paths)
    outputs = []
    in_halves = query.dtype in _HALVES or torch.is_autocast_enabled("cpu")
    widens = in_halves and query.device.type == "cpu" and torch.is_grad_enabled()
    for q, k, v, own in zip(*(row.records(states, 2) for states in (query, key, value)), row.own, strict=True):
        length = q.shape[2]
        windowed = sliding_window is not None and length > sliding_window
        with contextlib.ExitStack() as precision:
            if widens and length <= _SHORT:
                precision.enter_context(torch.autocast("cpu", enabled=False))
                q, k, v = q.float(), k.float(), v.float()
            output = functional.scaled_dot_product_attention(
                q, k, v,
                attn_mask=_band(length, sliding_window, q.device) if windowed else None,
                dropout_p=dropout, is_causal=not windowed, scale=scaling,
            )  # fmt: skip
        outputs.append(output[:, :, length - own :].transpose(1, 2).to(value.dtype))
    return torch.cat(outputs, 1), None


def one_call_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As :func:`segment_attention`, all records in one call; by the loop where the kernel has no way to do it.

    The kernel takes two bytes a value, knows no dropout, and reads heads side by side: (T, heads, d).
    """
    wide = query.dtype not in _HALVES or query.shape[-1] > _WIDEST_HEAD
    if attention_mask is not None or options.get("dropout") or wide:
        return segment_attention(module, query, key, value, attention_mask, **options)
    row = _Row.of(options.get("segment_lengths") or [query.shape[2]], options.get("segment_paths"))
    window = options.get("sliding_window")
    ends, longest = _ends(row.totals, query.device), max(row.totals)
    before = -1 if window is None or window >= longest else window - 1
    q, k, v = (row.laid_out(states[0].transpose(0, 1)) for states in (query, key, value))  # (T', heads, d)
    output = varlen.varlen_attn(
        q, k, v, ends, ends, longest, longest,
        scale=options.get("scaling"), window_size=(before, 0), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    assert isinstance(output, Tensor), "nothing but the output was asked for"
    return row.own_of(output)[None], None


@functools.lru_cache(maxsize=4)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each record of a row begins, and where the last one ends, (N + 1,) int32; once for all layers of a row."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)


def has_one_call(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a model may have the kernel on this device; whether it agrees is seen when it is tried.

    Weights of four bytes are left to the loop: what is tried is not what autocast would compute.
    """
    return varlen is not None and device.type == "cuda" and dtype in _HALVES


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
AttentionInterface.register(ONE_CALL, one_call_attention)
for _name in OWN:
    AttentionMaskInterface.register(_name, _segment_mask)
