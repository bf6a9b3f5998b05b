"""The frozen stack folded into the base or kept live, the new adapter put on top of it, and the proof of both."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from stackctl.core import Say
from stackctl.core.errors import Incompatible, VerificationFailed
from stackctl.engine.algebra import truncate
from stackctl.engine.data.examples import Example
from stackctl.engine.devices import generators_of
from stackctl.engine.live_adapter import LIVE, attach_live, check_live, layer_factors
from stackctl.engine.loss.logits import causal_lm, probe, without_noise
from stackctl.engine.models import StackedModel
from stackctl.engine.tensors import MemberTensors, decomposing
from stackctl.engine.training import distributed as group
from stackctl.engine.training import proofs
from stackctl.engine.training.adapter import ADAPTER, new_layers
from stackctl.engine.training.fused_modules import fuse
from stackctl.engine.training.lora_sum import add_in_place, draw_own_noise
from stackctl.engine.training.targets import Targets, check_rows
from stackctl.engine.training.teaching import Teaching
from stackctl.jobs.beginning import Beginning
from stackctl.jobs.job import PreparedJob
from stackctl.lora.target_modules import natural_order
from stackctl.plan.stack_plan import StackPlan

FOLD_TOLERANCE = 1e-3
"""Largest share of the frozen deltas that folding may lose to rounding before ``auto`` keeps the stack live."""


@dataclass(frozen=True)
class Attached:
    """A model that is ready to learn. ``how`` the frozen stack is kept: none, fold or live.

    ``frozen`` are the logits for ``probe_tokens`` with the new adapter off, by the model's own ``attention``;
    ``trainable`` is the number of parameters.
    """

    model: PeftModel
    how: str
    teaching: Teaching | None
    probe_tokens: Tensor
    frozen: Tensor
    attention: str
    trainable: int

    @property
    def live(self) -> str | None:
        """The frozen stack's name inside PEFT, where it is kept live."""
        return LIVE if self.how == "live" else None

    def check_unchanged(self) -> None:
        """Look at what is frozen once more, and at what learns; the model has its own attention afterwards.

        Another kernel rounds otherwise, which in two bytes a value is no small difference.

        Raises:
            VerificationFailed: it is not what it was.
        """
        inner = causal_lm(self.model)
        if inner.config._attn_implementation != self.attention:
            inner.set_attn_implementation(self.attention)
        with proofs.new_adapter_off(self.model, self.live):
            proofs.check_unchanged(self.frozen, probe(self.model, self.probe_tokens))
        proofs.check_trainable(self.model)


def attach_all(stacked: StackedModel, prepared: PreparedJob, targets: Targets, first: Example, say: Say) -> Attached:
    """Freeze the stack, put the new adapter on top, and a teacher beside it; ``first`` is the record to probe with.

    Raises:
        VerificationFailed: other parameters than the new adapter's are trainable, or the stack has no effect.
    """
    if prepared.job.objective != "sft":  # else the answers would have noise that what they are compared with has not
        without_noise(stacked.model)
    probe_tokens = proofs.probe_tokens(first.input_ids)
    bare = probe(stacked.model, probe_tokens)
    how = freeze_stack(stacked, prepared, targets, say)
    model = attach_new(stacked, prepared, targets, live=how == "live")
    if not group.keeps_parts():
        draw_own_noise(model)
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
    attention: str = stacked.model.config._attn_implementation
    return Attached(model, how, teaching, probe_tokens, frozen, attention, trainable)


def freeze_stack(stacked: StackedModel, prepared: PreparedJob, targets: Targets, say: Say) -> str:
    """Fold the frozen stack into the base, or leave it to be attached live. Returns none, fold or live.

    ``auto`` keeps it live where folding loses much of it, unless it cannot be kept beside the new adapter.
    """
    if not prepared.plan.members:
        return "none"
    if prepared.stays_live:  # nothing at all is folded, for the proof to find
        return "live"
    stacked.use(prepared.plan)
    if prepared.job.frozen == "fold" or stacked.rounding_error <= FOLD_TOLERANCE:
        return "fold"
    lost = f"{stacked.rounding_error:.1%} of the frozen stack"
    try:
        check_live(prepared.plan, targets.settings.get("target_parameters"))
    except Incompatible as error:
        say(f"note: folding loses {lost} to rounding, and it cannot be kept live: {error.message}; it is folded")
        return "fold"
    say(f"folding would lose {lost} to rounding: it is kept live")
    stacked.restore()
    return "live"


def attach_new(stacked: StackedModel, prepared: PreparedJob, targets: Targets, *, live: bool) -> PeftModel:
    """Put the new adapter on the model, with the frozen stack beside it if it is live; only the new one trains.

    Raises:
        VerificationFailed: PEFT attached something else than it was asked for.
    """
    job, base, alpha = prepared.job, prepared.base, prepared.job.effective_alpha()
    config = LoraConfig(
        r=job.effective_rank(),
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=job.dropout,
        use_rslora=job.use_rslora,
        task_type="CAUSAL_LM",
        **copy.deepcopy(targets.settings),
        **(prepared.beginning.patterns if prepared.beginning else {}),
    )
    if live:
        stacked.write_token_rows(prepared.plan)
    stacked.model.name_or_path = base.hub_id or str(stacked.folder)
    with torch.random.fork_rng(generators_of(stacked.device)):
        torch.manual_seed(prepared.initial_seed)
        model: PeftModel = get_peft_model(stacked.model, config, adapter_name=ADAPTER)
    if odd := sorted({name for name, _ in new_layers(model)} ^ targets.modules, key=natural_order):
        raise VerificationFailed(
            f"PEFT did not attach the adapter to what it was asked for: {', '.join(odd[:3])}; nothing was trained",
            hint=f"register the base again: stackctl base rm {base.name}, then stackctl base add {base.name}",
        )
    check_rows(model, base, targets.settings)
    if prepared.beginning:
        begin_at(model, prepared.beginning)
    if live:
        attach_live(model, prepared.plan)
        cast(LoraModel, model.base_model).set_adapter([LIVE, ADAPTER])
        freeze_live(model)
    return model


def attach_teacher(model: PeftModel, plan: StackPlan) -> Teaching:
    """Put a teacher beside the new adapter, which begins at the best pair of its rank for the teacher's sum."""
    if not plan.modules:
        return Teaching(model, None, plan.expression)
    with torch.no_grad(), MemberTensors(plan) as tensors:
        for name, layer in new_layers(model):
            if name in plan.modules:
                factors = tensors.factors(plan.modules[name])
                with decomposing(name, factors):
                    pair = truncate(factors, rank=layer.r[ADAPTER])
                put_factors(layer, *pair, 1.0)
    attach_live(model, plan)
    cast(LoraModel, model.base_model).set_adapter([ADAPTER])
    freeze_live(model)
    return Teaching(model, LIVE, plan.expression)


def freeze_live(model: PeftModel) -> None:
    """Let nothing of a stack learn that :func:`attach_live` put on a model."""
    for name, parameter in model.named_parameters():
        if f".{LIVE}." in name or name.endswith(f".{LIVE}"):
            parameter.requires_grad_(False)


@torch.no_grad()
def begin_at(model: PeftModel, beginning: Beginning) -> None:
    """Give the new adapter the factors and rows of another: its first step begins with that one's effect."""
    modules = beginning.plan.modules
    with MemberTensors(beginning.plan) as tensors:
        for name, layer in new_layers(model):
            put_factors(layer, *tensors.factors(modules[name])[0])
        for rows in beginning.plan.token_rows:
            adapter: Any = model.get_base_model().get_submodule(rows.module).token_adapter
            places = [adapter.token_indices[ADAPTER].index(token) for token in rows.tokens]
            values = adapter.trainable_tokens_delta[ADAPTER]
            values[places] = tensors.of(rows.member, rows.tensor).to(values)


def put_factors(layer: LoraLayer, a: Tensor, b: Tensor, scale: float) -> None:
    """Give the new adapter on a layer the effect of other factors, A (r, in) and B (out, r).

    Rows of A beyond their rank stay as they were drawn, with columns of zeros in B. B takes up another scaling.
    """
    new_a, new_b = layer_factors(layer, ADAPTER)
    if ADAPTER in layer.lora_embedding_A:  # PEFT draws B of an embedding and leaves A at zero
        new_a[a.shape[0] :].normal_()
    new_a[: a.shape[0]].copy_(a)
    new_b.zero_()
    ratio = scale / layer.scaling[ADAPTER]
    new_b[:, : b.shape[1]].copy_(b if abs(ratio - 1) < 1e-12 else b * ratio)
