"""Answers to many requests at once, of different stacks: by transformers in one running batch, or by llama.cpp."""

from stackctl.engine.serving.batching import BatchingEngine
from stackctl.engine.serving.requests import Engine, Limits, QueueFull, Row

__all__ = ["BatchingEngine", "Engine", "Limits", "QueueFull", "Row"]
