"""One more token for each row of a batch, in as few operators as it takes, where the model is a plain decoder.

A step of a small model reads its weights in half of its time; the rest are thousands of small operators, each of which
finds its code no longer in the cache. Here a layer has some twenty in place of seventy: keys and values are written
into memory that is there, rows are never padded, and norms and rotations are one call. Linear modules are called as
they are, so that whatever is attached to them counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from stackctl.engine.base.configuration import longrope_lengths
from stackctl.engine.base.private_weights import MappedModules
from stackctl.engine.generation.kv_cache import Attending, CacheShape, KVCache
from stackctl.engine.generation.mapped_weights import MappedWeights
from stackctl.engine.generation.prefill import Prefill
from stackctl.engine.generation.prefix_cache import new_cache
from stackctl.engine.generation.row_products import Packing, RowProduct, draft_costs, product
from stackctl.engine.models import StackedModel

_PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Types of model that are read below; their own classes in transformers, and nothing derived from them."""


class PlainDecoder:
    """A causal LM of attention, rotary positions, RMS norms and residuals; see :func:`plain_decoder`."""

    def __init__(self, model: Any, folder: Path) -> None:
        inner = model.model
        self._embed, self._head, self._rotary = inner.embed_tokens, product(model.lm_head), inner.rotary_emb
        self._layers = [_Layer(layer) for layer in inner.layers]
        self._norm = _norm(inner.norm)
        self._products = [*(one for layer in self._layers for one in layer.products), self._head]
        self._packing = Packing(self._products)
        self._mapped = MappedWeights(MappedModules(folder, [*inner.layers, model.lm_head]))
        self.draft_costs: Mapping[int, float] = draft_costs() if model.dtype == torch.float32 else {}
        """In half precision a pass over several tokens rounds so coarsely in another way that another text may come."""
        self.groups: int = inner.layers[0].self_attn.num_key_value_groups
        heads, width = model.config.num_key_value_heads, inner.layers[0].self_attn.head_dim
        self.kept = CacheShape(len(inner.layers), heads, width, model.dtype)
        self.bytes_of_token: int = 2 * len(inner.layers) * heads * width * model.dtype.itemsize

    def rows(self, places: int) -> KVCache:
        """An empty batch of up to so many rows."""
        return KVCache(self, places)

    def read(self, tokens: Tensor, prompts: Prefill) -> Tensor:
        """The logits (prompts, vocabulary) behind prompts, of all their tokens; keys and values are written."""
        return self._logits(self._through(tokens, prompts)[prompts.last])

    def step(self, tokens: Tensor, rows: KVCache) -> Tensor:
        """The logits (rows · tokens, vocabulary) behind new tokens of each row, whose keys and values are written."""
        self._mapped.begin()
        logits = self._logits(self._through(tokens, rows, self._mapped.passed))
        self._mapped.passed()
        return logits

    def _through(self, tokens: Tensor, rows: Attending, passed: Callable[[], object] = lambda: None) -> Tensor:
        """What the layers make of tokens: (tokens, width). ``passed`` is called behind each of them."""
        hidden: Tensor = self._embed(tokens)
        turn = self._turn(rows.positions, hidden)
        for number, layer in enumerate(self._layers):
            hidden = layer(hidden, turn, rows, number)
            passed()
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._norm(hidden)).float()

    def prepare(self, rows: int, steps: int) -> None:
        """Before a step of so many rows, with so many that may still come: lay out the weights as it is quickest."""
        if not self._packing.prepare(rows, steps) and self._mapped.prepare(rows, steps):
            for one in self._products:
                if isinstance(one, RowProduct):
                    one.renew()

    def _turn(self, positions: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (rows, 1, head width) of positions; the first half of the sine is negative, as
        ``rotate_half`` has it."""
        cosine, sine = (found[0].unsqueeze(1) for found in self._rotary(like, position_ids=positions[None]))
        first, second = sine.chunk(2, -1)
        return cosine, torch.cat((-first, second), -1)


class _Layer:
    def __init__(self, layer: Any) -> None:
        own, mlp = layer.self_attn, layer.mlp
        linear = (own.q_proj, own.k_proj, own.v_proj, own.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        self.products = [product(module) for module in linear]
        self._to_query, self._to_key, self._to_value, self._out, self._gate, self._up, self._down = self.products
        self._act = mlp.act_fn
        self._before, self._behind = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self._query_norm, self._key_norm = (
            _norm(getattr(own, name)) if hasattr(own, name) else None for name in ("q_norm", "k_norm")
        )
        self._width, self._scale = own.head_dim, own.scaling

    def __call__(self, hidden: Tensor, turn: tuple[Tensor, Tensor], rows: Attending, number: int) -> Tensor:
        count, width = len(hidden), self._width
        normed = self._before(hidden)
        query = self._to_query(normed).view(count, -1, width)  # (rows · tokens, heads, head width)
        key = self._to_key(normed).view(count, -1, width)
        value = self._to_value(normed).view(count, -1, width)
        if self._query_norm and self._key_norm:
            query, key = self._query_norm(query), self._key_norm(key)
        heads = query.shape[1]
        both = torch.cat((query, key), 1)
        both = torch.addcmul(both * turn[0], both.roll(width // 2, -1), turn[1])
        seen = rows.attend(number, both[:, :heads], both[:, heads:], value, self._scale)
        hidden = hidden + self._out(seen.reshape(count, heads * width))
        normed = self._behind(hidden)
        return hidden + self._down(self._act(self._gate(normed)) * self._up(normed))


def plain_decoder(stacked: StackedModel) -> PlainDecoder | None:
    """What decodes a model step by step on a CPU, if it is one that this module knows."""
    model: Any = stacked.model
    kind = model.config.model_type
    if stacked.device.type != "cpu" or kind not in _PLAIN or type(model).__module__ != _module(kind):
        return None
    if longrope_lengths(model.config):
        return None
    cache = new_cache(stacked)
    if cache is None or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    width = model.model.rotary_emb(torch.zeros(1), position_ids=torch.zeros(1, 1, dtype=torch.long))[0].shape[-1]
    layers = model.model.layers
    if any(type(layer).__module__ != _module(kind) or layer.self_attn.head_dim != width for layer in layers):
        return None
    return PlainDecoder(model, stacked.folder)


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
