"""One more token for each row of a batch, in as few operators as it takes, where the model is a plain decoder.

A step of a small model reads its weights in half of its time; the rest are thousands of small operators, each of which
finds its code no longer in the cache. Here a layer has some twenty in place of seventy: keys and values are written
into memory that is there, rows are never padded, and norms and rotations are one call. Linear modules are called as
they are, so that whatever is attached to them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from stackctl.engine.generation.prefix_cache import new_cache
from stackctl.engine.models import StackedModel

_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Types of model that are read below; their own classes in transformers, and nothing derived from them."""
_MORE_COLUMNS = 128


class PlainDecoder:
    """A causal LM of attention, rotary positions, RMS norms and residuals; see :func:`plain_decoder`."""

    def __init__(self, model: Any) -> None:
        self._model, inner = model, model.model
        self._embed, self._head, self._rotary = inner.embed_tokens, model.lm_head, inner.rotary_emb
        self._layers = [_Layer(layer) for layer in inner.layers]
        self._norm = _norm(inner.norm)
        heads, width = model.config.num_key_value_heads, inner.layers[0].self_attn.head_dim
        self.bytes_of_token: int = 2 * len(inner.layers) * heads * width * model.dtype.itemsize

    def rows(self, places: int) -> RunningRows:
        """An empty batch of up to so many rows."""
        return RunningRows(self, places)

    def read(self, ids: Tensor, cache: DynamicCache, last: Sequence[int]) -> Tensor:
        """The logits (rows, vocabulary) behind the ``last`` token of each row of prompts (rows, tokens).

        What follows that token is padding, which nothing before it sees. The cache takes up keys and values.
        """
        hidden = self._model.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
        logits: Tensor = self._head(hidden[torch.arange(len(last)), list(last)])
        return logits.float()

    def step(self, tokens: Tensor, rows: RunningRows) -> Tensor:
        """The logits (rows, vocabulary) behind one more token of each row, whose keys and values are written."""
        hidden = self._embed(tokens)  # (rows, width)
        turn = self._turn(rows.positions, hidden)
        for number, layer in enumerate(self._layers):
            hidden = layer(hidden, turn, rows, number)
        logits: Tensor = self._head(self._norm(hidden))
        return logits.float()

    def _turn(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (rows, 1, head width) of positions; the first half of the sine is negative, as
        ``rotate_half`` has it."""
        cosine, sine = (found[0].unsqueeze(1) for found in self._rotary(like, position_ids=positions[None]))
        first, second = sine.chunk(2, -1)
        return cosine, torch.cat((-first, second), -1)


class _Layer:
    def __init__(self, layer: Any) -> None:
        own = layer.self_attn
        self._own, self._mlp, self._half = own, layer.mlp, own.head_dim // 2
        self._before, self._behind = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._query_norm, self._key_norm = (
            _norm(getattr(own, name)) if hasattr(own, name) else None for name in ("q_norm", "k_norm")
        )
        self._groups, self._width, self._scale = own.num_key_value_groups, own.head_dim, own.scaling

    def __call__(self, hidden: Tensor, turn: tuple[Tensor, Tensor], rows: RunningRows, number: int) -> Tensor:
        own, count, width = self._own, len(hidden), self._width
        normed = self._before(hidden)
        query = own.q_proj(normed).view(count, -1, width)  # (rows, heads, head width)
        key = own.k_proj(normed).view(count, -1, width)
        value = own.v_proj(normed).view(count, -1, width)
        if self._query_norm and self._key_norm:
            query, key = self._query_norm(query), self._key_norm(key)
        heads = query.shape[1]
        both = torch.cat((query, key), 1)
        both = torch.addcmul(both * turn[0], both.roll(self._half, -1), turn[1])
        keys, values = rows.write(number, both[:, heads:], value)
        seen = functional.scaled_dot_product_attention(
            both[:, :heads].view(count, -1, self._groups, width), keys, values, rows.mask, scale=self._scale
        )  # the heads of a group are the queries of their one key
        hidden = hidden + own.o_proj(seen.reshape(count, heads * width))
        made: Tensor = self._mlp(self._behind(hidden))
        return hidden + made


class RunningRows:
    """Keys and values of rows that join and leave, each from column 0 on, in memory that is made once.

    ``positions`` are the rows' next columns, ``mask`` (rows, 1, 1, columns) what they see; None where it is everything.
    """

    def __init__(self, decoder: PlainDecoder, places: int) -> None:
        self._decoder, self._places = decoder, places
        self._lengths: list[int] = []
        self._memory: list[tuple[Tensor, Tensor]] = []  # by layer: (places, heads, columns, head width)
        self.positions = self._at = torch.empty(0, dtype=torch.long)
        self.mask: Tensor | None = None

    def join(self, prompts: Sequence[Sequence[int]], cache: DynamicCache | None = None) -> Tensor:
        """Add rows; returns the logits (rows, vocabulary) behind them. ``cache`` has the beginning of a single one."""
        cache = DynamicCache() if cache is None else cache
        known, first, width = cache.get_seq_length(), len(self._lengths), max(map(len, prompts))
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))][known:] for prompt in prompts])
        logits = self._decoder.read(ids, cache, [len(prompt) - known - 1 for prompt in prompts])
        held = _held(cache)
        self._make_room(width, held)
        for memory, own in zip(self._memory, held, strict=True):
            for to, new in zip(memory, own, strict=True):
                to[first : first + len(prompts), :, :width] = new
        self._lengths += map(len, prompts)
        return logits

    def step(self, tokens: Sequence[int]) -> Tensor:
        """One more token of every row; returns the logits (rows, vocabulary) behind it."""
        longest, count = max(self._lengths), len(self._lengths)
        self._make_room(longest + 1, self._memory)
        self.positions = torch.tensor(self._lengths)
        if longest == min(self._lengths):
            self.mask = None
        else:
            self.mask = (torch.arange(longest + 1) <= self.positions[:, None])[:, None, None]
            heads, columns = self._memory[0][0].shape[1:3]
            self._at = (torch.arange(count * heads).view(count, heads) * columns + self.positions[:, None]).flatten()
        logits = self._decoder.step(torch.tensor(tokens), self)
        self._lengths = [length + 1 for length in self._lengths]
        return logits

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put a token's key and value (rows, heads, head width) behind each row; returns all of the layer's."""
        count, columns = len(self._lengths), max(self._lengths) + 1
        keys, values = self._memory[layer]
        if self.mask is None:
            keys[:count, :, columns - 1], values[:count, :, columns - 1] = key, value
        else:
            for memory, new in ((keys, key), (values, value)):
                memory.view(-1, memory.shape[-1]).index_copy_(0, self._at, new.reshape(-1, new.shape[-1]))
        return keys[:count, :, :columns], values[:count, :, :columns]

    def leave(self, row: int) -> None:
        """A row leaves, and the last one takes its place."""
        last = self._lengths.pop()
        if row == len(self._lengths):
            return
        self._lengths[row] = last
        for both in self._memory:
            for memory in both:
                memory[row, :, :last] = memory[len(self._lengths), :, :last]

    def hand_over(self, cache: DynamicCache) -> int:
        """Let a cache hold what the only row has by now; returns how many tokens that are."""
        [length] = self._lengths
        for layer, (keys, values) in zip(cast("list[DynamicLayer]", cache.layers), self._memory, strict=True):
            layer.keys, layer.values = keys[:1, :, :length], values[:1, :, :length]
        return length

    def _make_room(self, columns: int, like: Sequence[tuple[Tensor, Tensor]]) -> None:
        """For so many columns, of heads as in ``like``. What the mask hides has to be a number, too: zeros."""
        if self._memory and self._memory[0][0].shape[2] >= columns:
            return
        columns += max(_MORE_COLUMNS, columns // 2)
        made = []
        for keys, values in like:
            made.append(
                (
                    keys.new_zeros(self._places, keys.shape[1], columns, keys.shape[3]),
                    values.new_zeros(self._places, values.shape[1], columns, values.shape[3]),
                )
            )
        for both, held in zip(made, self._memory, strict=False):
            for new, old in zip(both, held, strict=True):
                new[:, :, : old.shape[2]] = old
        self._memory = made


def plain_decoder(stacked: StackedModel) -> PlainDecoder | None:
    """What decodes a model step by step on a CPU, if it is one that this module knows."""
    model: Any = stacked.model
    kind = model.config.model_type
    if stacked.device.type != "cpu" or kind not in _PLAIN or type(model).__module__ != _module(kind):
        return None
    cache = new_cache(stacked)
    if cache is None or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    width = model.model.rotary_emb(torch.zeros(1), position_ids=torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
    layers = model.model.layers
    if any(type(layer).__module__ != _module(kind) or layer.self_attn.head_dim != width for layer in layers):
        return None
    return PlainDecoder(model)


def _module(kind: str) -> str:
    return f"transformers.models.{kind}.modeling_{kind}"


def _norm(module: Any) -> Callable[[Tensor], Tensor]:
    """An RMS norm in four operators; in half precision its own way, which rounds in between.

    x w / √(|x|² / n + ε) is x w √n / √(|x|² + n ε).
    """
    weight: Tensor = module.weight
    if weight.dtype != torch.float32:
        own: Callable[[Tensor], Tensor] = module
        return own
    size = weight.shape[-1]
    scaled, least = weight.detach() * size**0.5, torch.tensor((size * module.variance_epsilon) ** 0.5)

    def normed(hidden: Tensor) -> Tensor:
        lengths = torch.hypot(torch.linalg.vector_norm(hidden, dim=-1, keepdim=True), least)
        return (hidden / lengths).mul_(scaled)

    return normed


def _held(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast("list[Any]", cache.layers)]
