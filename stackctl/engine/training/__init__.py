"""Train one adapter on a frozen, active stack, prove it, and register it whole or not at all."""

from stackctl.engine.training.dataset import Corpus, preview_parts, read_corpus
from stackctl.engine.training.memory import Estimate, estimate_job
from stackctl.engine.training.run import Trained, train_adapter

__all__ = ["Corpus", "Estimate", "Trained", "estimate_job", "preview_parts", "read_corpus", "train_adapter"]
