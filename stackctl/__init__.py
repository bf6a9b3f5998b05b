"""Train, compose, prove and ship stacks of LoRA adapters."""

__version__ = "0.1.0"
