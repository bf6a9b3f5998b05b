"""An adapter that begins on another stack or base than it stood on: how far it moved, and where it had best begin.

A few records are run where the adapter stood, with its plain copy where it stands now, and with the closed-form
correction of :mod:`stackctl.engine.training.correction`; whichever of the two has the lower loss is begun at. Each
process does the same on the same records.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import torch
from peft import PeftModel
from torch import Tensor, nn

from stackctl.core import Say
from stackctl.core.errors import Incompatible
from stackctl.core.provenance import Moved
from stackctl.engine.data.examples import Encoded, Example, supervised_count
from stackctl.engine.data.rows import collate
from stackctl.engine.devices import float64
from stackctl.engine.evaluation.scoring import record_losses
from stackctl.engine.evaluation.significance import RecordScore, paired_test, ratio_error
from stackctl.engine.live_adapter import layer_factors
from stackctl.engine.loss.logits import supervised_logits
from stackctl.engine.models import StackedModel, evaluating, load_base
from stackctl.engine.tensors import MemberTensors
from stackctl.engine.training.adapter import ADAPTER, new_layers
from stackctl.engine.training.correction import corrected, input_moments
from stackctl.engine.training.dataset import Corpus
from stackctl.jobs.beginning import Beginning
from stackctl.jobs.former_training import Former
from stackctl.jobs.job import PreparedJob, optimizer_steps
from stackctl.plan.stack_plan import StackPlan
from stackctl.registry.store import Registry

_RECORDS = 16
_TOKENS = 2048
_SHARE = 16
_FEWEST = 8
"""A run is looked at with no more than a sixteenth of the records that it sees, but with eight at least."""
_VALUES = 1 << 26
"""Log-probabilities that are kept, 268 MB in float32: supervised tokens times vocabulary."""


@dataclass(frozen=True)
class _Outputs:
    """What a model made of records: their scores, and log-probabilities (K, vocabulary) of each."""

    scores: list[RecordScore]
    logs: list[Tensor]

    @property
    def loss(self) -> float:
        return sum(score.loss for score in self.scores) / sum(score.tokens for score in self.scores)


@dataclass
class Move:
    """A move that is being looked at: :meth:`look_back` before the stack is frozen, :meth:`begin` when the copy is on.

    ``judged`` are the records that it is judged by, ``learned`` those that the correction is made of.
    """

    prepared: PreparedJob
    beginning: Beginning
    former: Former
    judged: list[Example]
    learned: list[Example]
    own_data: bool
    say: Say
    before: _Outputs | None = None
    mark: float | None = None
    seconds: float = 0.0
    _whole: Sequence[Example] = field(default_factory=list)

    def look_back(self, stacked: StackedModel, registry: Registry) -> bool:
        """Run the records, and the held-out ones unless the entry says their loss, where the adapter stood.

        Returns whether that can be done.
        """
        started = time.perf_counter()
        job, base = self.prepared.job, self.former.base
        same = base.fingerprint == stacked.base.fingerprint
        former = stacked if same else load_base(base, registry, dtype=job.dtype)
        if not same and former.tokenizer.get_vocab() != stacked.tokenizer.get_vocab():
            self.say(f"note: how far {self.beginning.label} moved is not known: '{base.name}' has another vocabulary")
            return False
        try:
            former.use(self.former.plan, live=job.dtype == "nf4")
            self.before = _run(former.model, self.judged)
            if self.mark is None and self._whole:
                self.mark = sum(record_losses(former.model, self._whole)) / max(supervised_count(self._whole), 1)
        except Incompatible as error:
            self.say(f"note: how far {self.beginning.label} moved is not known: {error.message}")
            return False
        finally:
            former.restore()
        self.seconds += time.perf_counter() - started
        return True

    def begin(self, model: PeftModel) -> dict[str, Any]:
        """Run the records with the plain copy and with its correction, and leave the better one on the model.

        Returns the fields of :class:`Moved`, as they are saved with the run.
        """
        assert self.before is not None, "it is looked back before the stack is frozen"
        started = time.perf_counter()
        layers = {
            name: (layer, *layer_factors(layer, ADAPTER), layer.scaling[ADAPTER])
            for name, layer in new_layers(model)
            if ADAPTER in layer.lora_A
        }
        copy = _run(model, self.judged)
        correction: _Outputs | None = None
        if self.former.changed is not None:
            readers = {name: (cast(nn.Module, layer), a.detach()) for name, (layer, a, _, _) in layers.items()}
            with input_moments(readers) as moments, evaluating(model):
                record_losses(model, self.learned)
            copied = _correct(layers, moments, self.former.changed)
            correction = _run(model, self.judged)
            if not correction.loss < copy.loss:
                with torch.no_grad():
                    for name, b in copied.items():
                        layers[name][2].copy_(b)
        self.seconds += time.perf_counter() - started
        return msgspec.structs.asdict(self._found(self.before, copy, correction))

    def _found(self, before: _Outputs, copy: _Outputs, correction: _Outputs | None) -> Moved:
        divergences = [float((p.exp() * (p - q)).sum()) for p, q in zip(before.logs, copy.logs, strict=True)]
        tokens = [score.tokens for score in before.scores]
        moved = Moved(
            base=self.former.base.name,
            trained_on=list(self.beginning.member.version.trained_on),
            records=len(tokens),
            tokens=sum(tokens),
            own_data=self.own_data,
            divergence=sum(divergences) / sum(tokens),
            divergence_error=ratio_error(divergences, tokens),
            loss_before=before.loss,
            loss_copy=copy.loss,
            difference_error=paired_test(copy.scores, before.scores).standard_error,
            loss_corrected=correction.loss if correction else None,
            corrected=correction is not None and correction.loss < copy.loss,
            mark=self.mark,
            reached_step=None,
            seconds=round(self.seconds, 3),
        )
        self.say(_told(self.beginning.label, moved))
        return moved


def plan_move(prepared: PreparedJob, corpus: Corpus, say: Say) -> Move | None:
    """What there is to look at before a run; None where the adapter begins where it stood, or at nothing."""
    beginning = prepared.beginning
    former = beginning.former if beginning else None
    if beginning is None or former is None:
        return None
    if isinstance(former, str):
        say(f"note: how far {beginning.label} moved is not known: {former}")
        return None
    job, version = prepared.job, beginning.member.version
    steps = optimizer_steps(job, len(corpus.rows), 1)
    count = min(_RECORDS, max(_FEWEST, steps * job.effective_batch_size() * job.gradient_accumulation // _SHARE))
    recorded = version.eval_data if corpus.evaluation else version.data
    own = (corpus.held_out or corpus.records) if corpus.evaluation else corpus.records
    judged, learned = _samples(corpus.encoded, corpus.evaluation, count, prepared.base.vocabulary_size)
    mark, whole = None, list[Example]()
    if corpus.evaluation and job.objective == "sft":
        run, known = version.run, version.eval_data
        same = known is not None and corpus.held_out is not None and known.sha256 == corpus.held_out.sha256
        objective = (version.settings or {}).get("objective", "sft")
        mark = run.eval_loss if run and same and objective == "sft" else None
        whole = list(corpus.evaluation.examples) if mark is None else []
    own_data = recorded is not None and recorded.sha256 == own.sha256
    return Move(prepared, beginning, former, judged, learned, own_data, say, mark=mark, _whole=whole)


def _samples(
    encoded: Encoded, held_out: Encoded | None, count: int, vocabulary: int
) -> tuple[list[Example], list[Example]]:
    """Records to judge by, held-out ones where there are any, and others to learn from."""
    values = max(_VALUES // max(vocabulary, 1), 1)
    if held_out is not None:
        return _spread(held_out.examples, count, values), _spread(encoded.examples, count, values)
    found = _spread(encoded.examples, 2 * count, 2 * values)
    return found[::2], found[1::2] or found


def _spread(examples: Sequence[Example], count: int, supervised: int) -> list[Example]:
    """Up to so many examples from all over, with no more tokens than are looked at; at least one."""
    found: list[Example] = []
    tokens, step = 0, max(len(examples) / count, 1.0)
    for place in range(min(count, len(examples))):
        example = examples[int(place * step)]
        if not example.desired or not example.supervised:
            continue
        tokens, supervised = tokens + len(example.input_ids), supervised - example.supervised
        if found and (tokens > _TOKENS * count / _RECORDS or supervised < 0):
            break
        found.append(example)
    return found or [examples[0]]


def _run(model: nn.Module, examples: Sequence[Example]) -> _Outputs:
    device = next(model.parameters()).device
    scores, logs = list[RecordScore](), list[Tensor]()
    with evaluating(model):
        for example in examples:
            batch = {key: value.to(device) for key, value in collate([example]).items()}
            found = supervised_logits(model, batch).float().log_softmax(-1)  # (K, vocabulary)
            own = float64(found.gather(1, batch["labels"][:, None]))
            right = int((found.argmax(-1) == batch["labels"]).sum())
            scores.append(RecordScore(-float(own.sum()), len(own), right))
            logs.append(found)
    return _Outputs(scores, logs)


@torch.no_grad()
def _correct(layers: dict[str, Any], moments: dict[str, Tensor], changed: StackPlan) -> dict[str, Tensor]:
    """Put the correction on the layers beneath which something changed. Returns what their B's were."""
    copied = dict[str, Tensor]()
    with MemberTensors(changed) as tensors:
        for name, module in changed.modules.items():
            if name not in layers:
                continue
            _, a, b, scale = layers[name]
            copied[name] = b.detach().clone()
            b.copy_(corrected(a, b, scale, moments[name], tensors.factors(module, b.device)))
    return copied


def _told(label: str, moved: Moved) -> str:
    """A move in a sentence or two."""
    where = "+".join(moved.trained_on) or f"the bare {moved.base}"
    error = "" if moved.difference_error is None else f" ± {1.96 * moved.difference_error:.3f}"
    text = (
        f"{label} stood on {where}: on {moved.records} records its loss goes from {moved.loss_before:.3f} to "
        f"{moved.loss_copy:.3f} ({moved.loss_copy - moved.loss_before:+.3f}{error}), "
        f"its outputs move by {moved.divergence:.3g} nats a token"
    )
    if moved.loss_corrected is not None:
        taken = "begun at" if moved.corrected else "not taken"
        text += f"; corrected for what changed beneath it {moved.loss_corrected:.3f}, {taken}"
    return text
