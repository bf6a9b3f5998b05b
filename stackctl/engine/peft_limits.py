"""What PEFT cannot adapt in a model, or would not find again in a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from transformers import PreTrainedModel

from stackctl.lora.lora_config import PEFT_PREFIX


def is_forbidden(model: PreTrainedModel, name: str) -> bool:
    """Whether PEFT takes no LoRA on a module because of the model that it is in, as some of Mamba and its like."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def not_read_back(model: PeftModel, adapter: str, chosen: Collection[str]) -> set[str]:
    """Those of the chosen modules and parameters that PEFT would not find again in a checkpoint that it saved itself.

    It renames what it loads as transformers renames the files of old bases, and some of those patterns match the names
    of a loaded model as well. The model has no weights (meta device).
    """
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    state = {name: torch.empty(tensor.shape, device="meta") for name, tensor in saved.items()}
    result: Any = set_peft_model_state_dict(model, state, adapter_name=adapter, low_cpu_mem_usage=True)
    lost = set[str]()
    for key in result.missing_keys:
        if f".{adapter}" in key and "lora_" in key:
            name = key.removeprefix(PEFT_PREFIX).partition(".lora_")[0].replace(".base_layer", "")
            lost |= {own for own in chosen if own == name or own.rpartition(".")[0] == name}
    return lost
