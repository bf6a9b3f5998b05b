"""The base with the frozen stack and the new adapter on it, and the proof that the stack is active."""

from __future__ import annotations

from dataclasses import dataclass

from peft import PeftModel
from torch import Tensor

from stackctl.core import Say
from stackctl.engine.data.examples import Example
from stackctl.engine.live_adapter import LIVE
from stackctl.engine.loss.logits import probe
from stackctl.engine.models import StackedModel
from stackctl.engine.training import distributed as group
from stackctl.engine.training import proofs
from stackctl.engine.training.attach import attach_new, freeze_stack
from stackctl.engine.training.fused_modules import fuse
from stackctl.engine.training.lora_sum import add_in_place
from stackctl.engine.training.targets import Targets
from stackctl.engine.training.teaching import Teaching, attach_teacher
from stackctl.jobs.job import PreparedJob


@dataclass(frozen=True)
class Attached:
    """A model that is ready to learn. ``how`` the frozen stack is kept: none, fold or live.

    ``frozen`` are the logits for ``probe_tokens`` with the new adapter off, ``trainable`` the number of parameters.
    """

    model: PeftModel
    how: str
    teaching: Teaching | None
    probe_tokens: Tensor
    frozen: Tensor
    trainable: int

    @property
    def live(self) -> str | None:
        """The frozen stack's name inside PEFT, where it is kept live."""
        return LIVE if self.how == "live" else None

    def check_unchanged(self) -> None:
        """Look at what is frozen once more, and at what learns.

        Raises:
            VerificationFailed: it is not what it was.
        """
        with proofs.new_adapter_off(self.model, self.live):
            proofs.check_unchanged(self.frozen, probe(self.model, self.probe_tokens))
        proofs.check_trainable(self.model)


def attach_all(stacked: StackedModel, prepared: PreparedJob, targets: Targets, first: Example, say: Say) -> Attached:
    """Freeze the stack, put the new adapter on top, and a teacher beside it; ``first`` is the record to probe with.

    Raises:
        VerificationFailed: other parameters than the new adapter's are trainable, or the stack has no effect.
    """
    probe_tokens = proofs.probe_tokens(first.input_ids)
    bare = probe(stacked.model, probe_tokens)
    how = freeze_stack(stacked, prepared, targets, say)
    model = attach_new(stacked, prepared, targets, live=how == "live")
    if not group.keeps_parts():
        add_in_place(model)
        fuse(model)
    teaching = attach_teacher(model, prepared.teacher.plan) if prepared.teacher else None
    trainable = proofs.check_trainable(model)
    with proofs.new_adapter_off(model, LIVE if how == "live" else None):
        frozen = probe(model, probe_tokens)
    if prepared.plan.members:
        effect = proofs.check_active(bare, frozen, prepared.plan.expression)
        say(f"{prepared.plan.expression} is frozen ({how}) and active: it moves the logits by {effect:.1%}")
    if teaching and teaching.name:
        with teaching.speaking():
            effect = proofs.check_active(bare, probe(model, probe_tokens), teaching.label)
        say(f"{teaching.label} is the teacher, live beside the base: it moves the logits by {effect:.1%}")
    return Attached(model, how, teaching, probe_tokens, frozen, trainable)
