"""Weights of a member by layer or module, which stand there in place of its one weight. Pure: names to numbers.

A key is the name of a module, or of what holds modules, a layer for one: ``model.layers.3``,
``model.layers.3.self_attn.q_proj``. Ranges are as in a base's entry: ``model.layers.{0-5}``. The longest name that
fits a module decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from stackctl.lora.target_modules import expand_names

Per = Literal["member", "layer", "module"]
"""What gets a weight of its own where weights are learned."""


@dataclass(frozen=True)
class Weights:
    """What a member is multiplied by: ``weight``, and where ``by_name`` has a module, or what it stands in, that."""

    weight: float
    by_name: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, weight: float, layer_weights: Mapping[str, float]) -> Weights:
        """With the ranges of ``layer_weights`` written out.

        Raises:
            Usage: they stand for more names than any model has modules.
        """
        return cls(weight, expand_names(layer_weights) if layer_weights else {})

    def at(self, module: str) -> float:
        """The weight that stands on a module."""
        for name in _name_and_parents(module):
            if name in self.by_name:
                return self.by_name[name]
        return self.weight


def names_nothing(layer_weights: Mapping[str, float], modules: Iterable[str]) -> list[str]:
    """Those keys, ranges written out, under which none of the modules stands."""
    known = {name for module in modules for name in _name_and_parents(module)}
    return [name for name in expand_names(layer_weights) if name not in known]


def _name_and_parents(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]
