"""Train one adapter on a frozen, active stack, prove it, and register it whole or not at all."""

from stackctl.engine.training.corpus import Corpus, read_corpus
from stackctl.engine.training.run import Trained, train_adapter

__all__ = ["Corpus", "Trained", "read_corpus", "train_adapter"]
