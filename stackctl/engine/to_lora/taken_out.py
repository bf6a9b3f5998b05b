"""What a LoRA that begins with factors of the base's own took out of it (PiSSA, OLoRA), from each module it was in."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from stackctl.engine import algebra
from stackctl.engine.live_adapter import layer_factors
from stackctl.engine.to_lora.merged_layers import ADAPTER, Kept, tuner_layers
from stackctl.lora.checkpoint import Checkpoint
from stackctl.lora.convertible import KNOWN_RESIDUALS, beginning_of, variant_of


class Begun:
    """The factors that a LoRA begins with, where those were taken out of the base: of others there are none.

    ``layers`` are the modules that it stands on.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: nn.Module, kept: dict[str, Kept], sharing: dict[str, set[str]]
    ) -> None:
        config = checkpoint.config
        self.layers = {name for name, _ in tuner_layers(model, BaseTunerLayer)}
        self._kept, self._sharing, self._is_sum = kept, sharing, not variant_of(config)
        self._factors = {}
        if checkpoint.is_lora and beginning_of(config) in KNOWN_RESIDUALS:
            self._factors = {name: _factors_of(layer) for name, layer in tuner_layers(model, LoraLayer)}

    @property
    def neighbours(self) -> set[str]:
        """The modules that it does not stand on and that share the weight of one that it does."""
        return self._sharing.keys() - self.layers

    def difference(self, name: str, layer: Any) -> list[algebra.Factors]:
        """What changes in a layer: its factors, less what was taken out of its weight; none where more does."""
        return [_factors_of(layer), *self.taken_out(name)] if self._factors and self._is_sum else []

    def taken_out(self, name: str) -> list[algebra.Factors]:
        """What is gone from the weight of a module, by itself or by another that shares it."""
        found = []
        for other in sorted({name, *self._sharing.get(name, ())} & self._factors.keys()):
            a, b, scale = self._factors[other]
            turned = self._is_table(other) != self._is_table(name)
            found.append((b.T, a.T, -scale) if turned else (a, b, -scale))
        return found

    def _is_table(self, name: str) -> bool:
        return isinstance(self._kept[name].module, nn.Embedding)


def sharing_weights(model: nn.Module, targets: Sequence[str], *, apart: Collection[str]) -> dict[str, set[str]]:
    """The modules that share the weight of a target with others, by name, those others; without those ``apart``."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and name not in apart:
            owners.setdefault(id(weight), set()).add(name)
    groups = [names for names in owners.values() if len(names) > 1 and not names.isdisjoint(targets)]
    return {name: names - {name} for names in groups for name in names}


def _factors_of(layer: Any) -> algebra.Factors:
    a, b = layer_factors(layer, ADAPTER)
    return a.detach().float().cpu().clone(), b.detach().float().cpu().clone(), float(layer.scaling[ADAPTER])
