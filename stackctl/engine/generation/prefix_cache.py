"""What a model has computed of a conversation, kept so that the next prompt is computed from where it differs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from stackctl.engine.base.configuration import positions_change
from stackctl.engine.generation.shared_prefixes import FinishedTexts
from stackctl.plan.stack_plan import StackPlan

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import DynamicCache
    from transformers._typing import GenerativePreTrainedModel
    from transformers.cache_utils import DynamicLayer

    from stackctl.engine.models import StackedModel


class PrefixCache:
    """Keys and values of the tokens that went through a model last, under the stack that was used then.

    They are taken up again as far as the next prompt begins with the same tokens, if the stack is still the same. What
    cannot be cut to that length (a window that has moved on, a recurrent state) is computed again. That is for
    transformers' ``generate``; a plain decoder goes on from the text that is ``finished``.
    """

    def __init__(self) -> None:
        self.finished = FinishedTexts(1)
        self._ids: list[int] = []
        self._cache: DynamicCache | None = None
        self._plan: StackPlan | None = None

    def begin(self, stacked: StackedModel, ids: Sequence[int]) -> DynamicCache | None:
        """The cache to answer a prompt with, which holds its beginning; None for a model that keeps something else.

        At least one token is left to compute. Call ``keep`` with what went through the model when it is answered.
        """
        cache, self._cache = self._cache, None
        if cache is not None and self._plan is stacked.plan:
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(self._ids, ids, strict=False))
            length = min(len(list(same)), len(ids) - 1)
            if length and _cut(cache, length):
                self._cache = cache
        if self._cache is None:
            self._plan, self._cache = stacked.plan, new_cache(stacked)
        return self._cache

    def keep(self, ids: Sequence[int]) -> None:
        """These went through the model whole; whatever the cache holds beyond them is cut off.

        Nothing is kept when that cannot be done, as after Ctrl-C in the middle of a layer.
        """
        self._ids = list(ids)
        if self._cache is not None and not (ids and _cut(self._cache, len(ids))):
            self._cache = None


def new_cache(stacked: StackedModel) -> DynamicCache | None:
    """An empty cache of keys and values; None for a model that keeps something else, or whose positions change."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    model = cast("GenerativePreTrainedModel", stacked.model)
    if not model._supports_default_dynamic_cache() or positions_change(model):
        return None
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    return cache if all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers) else None


def _columns(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[-2]


def _cut(cache: DynamicCache, length: int) -> bool:
    """Leave the first ``length`` tokens in every layer; whether that was possible."""
    for layer in cast("list[DynamicLayer]", cache.layers):
        surplus = layer.get_seq_length() - length
        if surplus < 0:
            return False
        try:
            if surplus:
                layer.crop(-surplus)
        except RuntimeError:  # a window that has moved on
            return False
        if layer.get_seq_length() != length or _columns(layer.keys) != _columns(layer.values):
            return False
    return True
