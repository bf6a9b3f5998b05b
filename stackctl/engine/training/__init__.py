"""Train one adapter on a frozen, active stack, prove it, and register it whole or not at all."""

from stackctl.engine.training.dataset import Corpus, preview_parts, read_corpus
from stackctl.engine.training.memory import Estimate, estimate_job
from stackctl.engine.training.run import Trained, train_adapter
from stackctl.engine.training.state import RunOutput
from stackctl.engine.training.targets import Targets, targets_of

__all__ = [
    "Corpus", "Estimate", "RunOutput", "Targets", "Trained", "estimate_job", "preview_parts", "read_corpus",
    "targets_of", "train_adapter",
]  # fmt: skip
