"""Distilling: a stack on the base as the teacher of a new adapter on the same base, in one model.

The teacher's factors lie beside the new adapter's in each layer, and a forward pass uses the one or the other, so that
the base is in memory once. What is made small is KL(teacher || student) over the whole vocabulary, in float32 at
temperature 1, at each token that has a label (https://arxiv.org/abs/1503.02531); logits exist a chunk of tokens at a
time. With a system prompt (context distillation, https://arxiv.org/abs/2112.00861) the teacher reads longer examples
with the same labels.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import kl_div

from stackctl.engine.data.examples import Example
from stackctl.engine.data.rows import TEACHER, collate
from stackctl.engine.devices import float64
from stackctl.engine.evaluation.significance import ratio_error
from stackctl.engine.loss.logits import losses_of_hidden, split, supervised_hidden
from stackctl.engine.loss.output_head import OutputHead
from stackctl.engine.loss.token_losses import taught_by, token_losses
from stackctl.engine.models import evaluating
from stackctl.engine.training.distributed import numbers_of_each
from stackctl.engine.training.proofs import new_adapter_off
from stackctl.jobs import ranks


@dataclass(frozen=True)
class Teaching:
    """A model that holds a teacher beside the new adapter; ``name`` is the teacher's in it, None the bare base's.

    ``label`` is what the teacher is called.
    """

    model: PeftModel
    name: str | None
    label: str

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """The model is the teacher, in evaluation mode and without gradients, while the body runs."""
        with new_adapter_off(self.model, self.name), evaluating(self.model):
            yield

    def divergences(self, model: nn.Module, inputs: dict[str, Tensor], *, one_by_one: bool = False) -> Tensor:
        """KL(teacher || ``model``) at each supervised token (K,), nats, float32; its gradient is the model's alone.

        ``inputs`` are a collated micro-batch, ``model`` the student as it is wrapped. ``one_by_one`` as in
        :func:`stackctl.engine.loss.logits.supervised_token_losses`.
        """
        theirs, found = _of_teacher(inputs), []
        parts = list(zip(split(inputs), split(theirs), strict=True)) if one_by_one else []
        for own, behind in parts or [(inputs, theirs)]:
            taught = self._taught(behind)
            found.append(self._of_hidden(*supervised_hidden(model, own), own["labels"], taught))
        return torch.cat(found)

    def _taught(self, theirs: dict[str, Tensor]) -> Tensor:
        """The teacher's hidden states (K, d), or its logits where a model has no such head."""
        with self.speaking():
            return supervised_hidden(self.model, theirs)[1]

    def _of_hidden(self, head: OutputHead | None, hidden: Tensor, labels: Tensor, taught: Tensor) -> Tensor:
        if head is None:
            own, theirs = (logits.float().log_softmax(-1) for logits in (hidden, taught))
            return kl_div(own, theirs, reduction="none", log_target=True).sum(-1)
        own_head = isinstance(head.module, LoraLayer)
        target = taught_by(taught, self.speaking if own_head else contextlib.nullcontext)
        return token_losses(head, hidden, labels, target).losses

    def measure(self, wrapped: nn.Module, examples: Sequence[Example]) -> dict[str, float]:
        """``eval_loss``, the mean divergence (nats a token) on held-out records, and of several ``eval_error``, its
        standard error; ``eval_cross_entropy`` is the student's own loss. Each process reads its share.
        """
        device = next(wrapped.parameters()).device
        rows: list[tuple[float, float, float]] = []
        with evaluating(wrapped):
            for number in range(ranks.rank(), len(examples), ranks.world_size()):
                batch = {key: value.to(device) for key, value in collate([examples[number]]).items()}
                taught, labels = self._taught(_of_teacher(batch)), batch["labels"]
                head, hidden = supervised_hidden(wrapped, batch)
                divergences = self._of_hidden(head, hidden, labels, taught)
                own = losses_of_hidden(head, hidden, labels).losses
                rows.append((float(float64(divergences).sum()), float(len(own)), float(float64(own).sum())))
        rows += [(0.0, 0.0, 0.0)] * (-(-len(examples) // ranks.world_size()) - len(rows))  # as many of each process
        told = numbers_of_each([number for row in rows for number in row], device).view(-1, 3)
        totals, sizes, losses = told[told[:, 1] > 0].T.tolist()
        tokens = math.fsum(sizes)
        found = {"eval_loss": math.fsum(totals) / tokens, "eval_cross_entropy": math.fsum(losses) / tokens}
        if (error := ratio_error(totals, sizes)) is not None:
            found["eval_error"] = error
        return found


def _of_teacher(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the teacher reads: the same, but what is kept for it alone."""
    return {key: inputs.get(TEACHER + key, value) for key, value in inputs.items()}
