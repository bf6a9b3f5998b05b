"""Different stacks in one running batch: rows that join and leave, each with weights of its own."""

from stackctl.engine.serving.batching import Engine, Limits, QueueFull
from stackctl.engine.serving.rows import Row

__all__ = ["Engine", "Limits", "QueueFull", "Row"]
