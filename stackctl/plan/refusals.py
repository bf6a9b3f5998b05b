"""What cannot be summed at all, by the configuration of a member alone. Pure: no disk, no tensors."""

from __future__ import annotations

from collections.abc import Iterator

from stackctl.core.schema import Base
from stackctl.lora.convertible import beginning_of, convert_hint
from stackctl.lora.recognition import recognise_task, trains_parts_of_fused_layers
from stackctl.plan.stack_plan import PlanMember, Problem

_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEPT_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# Keys of LoraConfig that change nothing about what B and A mean once they are trained.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "alpha_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_rslora", "velora_config",
    "enable_lora", "merge_weights",  # of PEFT before 0.3; what the first of them may change is refused apart
    "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "swift_type",  # of ms-swift: how it was trained
}  # fmt: skip
NEWEST_PEFT = "0.21"
"""Whose options of a LoRA were all looked at; a newer one may have more."""
_REFUSED = {
    "use_dora": "is DoRA, whose effect is not a sum of deltas",
    "lora_bias": "has a bias in its B factor (lora_bias)",
    "layer_replication": "replicates layers of the base (layer_replication)",
    "alora_invocation_tokens": "is an activated LoRA, on only after its invocation tokens",
    "use_qalora": "is a QA-LoRA, whose factors have other shapes",
    "use_bdlora": "is a block-diagonal LoRA",
    "arrow_config": "routes between adapters (arrow_config)",
    "kasa_config": "is a KaSA adapter, whose effect is not a sum of deltas",
    "monteclora_config": "is a MonteCLoRA adapter, whose effect is not a sum of deltas",
}


def no_plain_lora(member: PlanMember) -> list[Problem]:
    """What a member is that is no LoRA for writing text; the rest of it need not be looked at then."""
    config, label = member.checkpoint.config, member.label
    if not member.checkpoint.is_lora:
        what = f"{label} is of PEFT type {str(config.get('peft_type'))[:40]}, not LORA"
        return [Problem("not_lora", what, _converted(member, "only LoRA adapters can be stacked"), label)]
    if found := recognise_task(config, member.checkpoint.tensors):
        return [Problem(found.kind, f"{label} {found.what}", found.hint, label)]
    if trains_parts_of_fused_layers(config):
        what = "was saved by a PEFT older than 0.3, with parts of fused layers adapted alone (enable_lora)"
        return [Problem("enable_lora", f"{label} {what}", f"train {member.adapter or label} again", label)]
    tensors = member.checkpoint.tensors
    if empty := [name for name, tensor in tensors.items() if 0 in tensor.shape]:
        what = f"{label}: {len(empty)} of its {len(tensors)} tensors are empty, as DeepSpeed ZeRO-3 leaves"
        why = f"{what} weights that were not gathered before they were saved"
        gather = "save it again with stage3_gather_16bit_weights_on_model_save, or run zero_to_fp32.py where it is"
        return [Problem("empty_tensors", why, gather, label)]
    return []


def _converted(member: PlanMember, otherwise: str) -> str:
    """The command that makes a plain LoRA of a member, where there is one."""
    checkpoint = member.checkpoint
    return convert_hint(checkpoint.config, member.adapter or "NAME", checkpoint.path) or otherwise


def refusals(member: PlanMember, base: Base | None = None) -> Iterator[Problem]:
    """What cannot be summed, by the configuration, and by what of its base is tied."""
    config, label = member.checkpoint.config, member.label
    again = f"train {member.adapter or label} again"
    for key, why in _REFUSED.items():
        if config.get(key):
            yield Problem(key, f"{label} {why}", _converted(member, f"{again} as a plain LoRA"), label)
    on_embedding = any("lora_embedding" in name for name in member.checkpoint.tensors)
    tying = config.get("ensure_weight_tying") and (base is None or base.tied_embeddings)  # else PEFT leaves them apart
    if tying and (config.get("modules_to_save") or on_embedding):
        what = f"{label} trains the embedding and the head as one (ensure_weight_tying)"
        yield Problem("ensure_weight_tying", what, f"{again} without that option", label)
    init = beginning_of(config)
    if init.startswith(_CHANGED_BASE):
        what = f"{label} was initialised with {init}, which changed the base it was trained on"
        otherwise = "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        if init.startswith("loftq"):  # of which PEFT's conversion knows nothing
            otherwise = (
                "register the base as LoftQ left it (get_base_model().save_pretrained), and add it there with "
                '"init_lora_weights": true'
            )
        hint = _converted(member, otherwise)
        yield Problem("changed_base", what, hint, label)
    elif init not in _KEPT_BASE:
        what = f"{label} was initialised with {init[:60]}, which is not known here and may have changed its base"
        hint = "pip install --upgrade stackctl-lora, or convert it to a plain LoRA"
        yield Problem("unknown_init", what, hint, label)
    if member.weight not in (0, 1) or member.layer_weights:
        if config.get("bias", "none") != "none":
            yield _not_weighable(label, f"trained biases (bias={config['bias']})")
        if config.get("modules_to_save") or saved_modules(member):
            yield _not_weighable(label, "whole modules (modules_to_save)")
    for key, value in config.items():
        if key not in _HARMLESS and key not in _REFUSED and value not in (None, False, [], {}, ""):
            saved_by = f"{label} was saved by PEFT {str(config.get('peft_version', '?'))[:20]} with '{key[:60]}'"
            what = f"{saved_by}, which is not known here: the options of PEFT up to {NEWEST_PEFT} are"
            hint = "pip install --upgrade stackctl-lora, or train it without that option"
            yield Problem("unknown_key", what, hint, label)


def _not_weighable(label: str, what: str) -> Problem:
    return Problem(
        "not_weighable", f"{label} carries {what}, which cannot be weighted", f"use {label} with weight 1", label
    )


def saved_modules(member: PlanMember) -> dict[str, tuple[int, ...]]:
    """The weights of whole modules that a member brings, by module, with their shapes."""
    checkpoint = member.checkpoint
    return {
        slot.module: checkpoint.tensors[name].shape
        for name, slot in checkpoint.slots.items()
        if slot.role == "saved" and name.endswith(".weight")
    }
