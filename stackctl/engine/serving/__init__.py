"""Answers to many requests at once, of different stacks: by transformers in one running batch, or by llama.cpp."""

from typing import TYPE_CHECKING

from stackctl.core.on_demand import on_demand
from stackctl.engine.serving.requests import Engine, Limits, QueueFull, Row

if TYPE_CHECKING:
    from stackctl.engine.serving.batching import BatchingEngine

__all__ = ["BatchingEngine", "Engine", "Limits", "QueueFull", "Row"]

__getattr__ = on_demand(__name__, batching=("BatchingEngine",))
