"""The frozen stack folded into the base or kept live, and the new adapter put on top of it."""

from __future__ import annotations

from collections.abc import Callable

from peft import LoraConfig, PeftModel, get_peft_model

from stackctl.core.schema import ModuleShape
from stackctl.engine.live_adapter import LIVE, attach_live
from stackctl.engine.models import StackedModel
from stackctl.engine.training.adapter import ADAPTER
from stackctl.jobs.job import PreparedJob
from stackctl.lora.target_modules import ALL_LINEAR, expand_modules, expected_targets

FOLD_TOLERANCE = 1e-3
"""Largest share of the frozen deltas that folding may lose to rounding before ``auto`` keeps the stack live."""

Say = Callable[[str], None]


def freeze_stack(stacked: StackedModel, prepared: PreparedJob, say: Say) -> str:
    """Fold the frozen stack into the base, or leave it to be attached live. Returns none, fold or live."""
    if not prepared.plan.members:
        return "none"
    live = prepared.job.frozen == "live" or prepared.job.dtype == "nf4"  # four bits have no room for a delta
    if live and prepared.plan.modules:  # nothing at all is folded, for the proof to find
        return "live"
    stacked.use(prepared.plan)
    if prepared.job.frozen == "fold" or stacked.rounding_error <= FOLD_TOLERANCE:
        return "fold"
    say(f"folding would lose {stacked.rounding_error:.1%} of the frozen stack to rounding: it is kept live")
    stacked.restore()
    return "live"


def attach_new(stacked: StackedModel, prepared: PreparedJob, *, live: bool) -> PeftModel:
    """Put the new adapter on the model, with the frozen stack beside it if it is live; only the new one trains."""
    job, base = prepared.job, prepared.base
    modules = expand_modules(base.modules)
    targets = prepared.target_modules
    chosen = expected_targets({"target_modules": targets}, modules, base.output_embedding) or set()
    if targets == ALL_LINEAR:  # by name: left to itself, PEFT would add the experts' parameters of a mixture
        targets = _names_for(chosen, modules)
    config = LoraConfig(
        r=job.rank,
        lora_alpha=_whole(job.effective_alpha()),
        lora_dropout=job.dropout,
        target_modules=targets,
        use_rslora=job.use_rslora,
        fan_in_fan_out=any(modules[name].type == "Conv1D" for name in chosen),
        task_type="CAUSAL_LM",
    )
    stacked.model.name_or_path = base.hub_id or str(stacked.folder)
    model: PeftModel = get_peft_model(stacked.model, config, adapter_name=ADAPTER)
    if live:
        attach_live(model, prepared.plan)
        model.base_model.set_adapter([LIVE, ADAPTER])
        for name, parameter in model.named_parameters():
            if f".{LIVE}." in name or name.endswith(f".{LIVE}"):
                parameter.requires_grad_(False)
    return model


def _names_for(chosen: set[str], modules: dict[str, ModuleShape]) -> list[str]:
    """The last parts of some modules' names where those choose just these modules, else the full names."""
    short = sorted({name.rpartition(".")[2] for name in chosen})
    return short if expected_targets({"target_modules": short}, modules, None) == chosen else sorted(chosen)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
