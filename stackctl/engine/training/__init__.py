"""Train one adapter on a frozen, active stack, prove it, and register it whole or not at all."""

from stackctl.engine.training.dataset import Corpus, preview_parts, read_corpus
from stackctl.engine.training.memory import ProcessGroup, StepPlan, plan_step
from stackctl.engine.training.optimizers import check_kernels
from stackctl.engine.training.run import Trained, train_adapter
from stackctl.engine.training.state import RunOutput
from stackctl.engine.training.targets import Targets, targets_of

__all__ = [
    "Corpus", "ProcessGroup", "RunOutput", "StepPlan", "Targets", "Trained", "check_kernels", "plan_step",
    "preview_parts", "read_corpus", "targets_of", "train_adapter",
]  # fmt: skip
